"""Reading `config.json` so that nothing which changes the maths is overlooked."""

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import RopeConfig
from fastft_jax.models.rope import ROPE_TYPES

# Keys that say nothing about the forward pass: bookkeeping, token ids, training-time settings, serving hints.
HARMLESS = frozenset(
    """_name_or_path architectures attention_dropout auto_map bos_token_id bad_words_ids cache_implementation
    chunk_size_feed_forward decoder_start_token_id dtype eos_token_id finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_range
    is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id language max_sequence_length model_type
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    quantization_config
    resid_pdrop embd_pdrop return_dict return_dict_in_generate sep_token_id task_specific_params temperature
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version use_bfloat16 use_cache
    unsloth_fixed unsloth_version add_cross_attention cross_attention_hidden_size pruned_heads
    num_labels model_max_length max_length min_length do_sample repetition_penalty length_penalty num_beams
    _attn_implementation _attn_implementation_autoset _sliding_window_pattern head_dtype""".split()
)

# Keys of other families that change the maths: with any value that switches them on, the model is not what we compute.
CHANGES_MATHS = frozenset(
    """attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar logit_scale logits_scaling
    embedding_multiplier residual_multiplier attention_multiplier num_experts num_local_experts n_routed_experts
    n_shared_experts num_experts_per_tok moe_intermediate_size partial_rotary_factor rotary_pct clip_qkv use_qk_norm
    qk_layernorm attention_chunk_size no_rope_layers no_rope_layer_interval use_parallel_residual parallel_attn alibi
    use_post_norm scale_depth scale_emb dim_model_base kv_lora_rank q_lora_rank attention_sinks
    attn_temperature_tuning rope_interleaved layer_types sliding_window_pattern
    num_nextn_predict_layers layer_norm_eps layer_norm_epsilon use_bidirectional_attention""".split()
)
# ... but for the value that is no change
NEUTRAL = dict.fromkeys(
    "partial_rotary_factor rotary_pct logit_scale logits_scaling embedding_multiplier residual_multiplier".split(), 1.0
)


# transformers' names of activations -> ours
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class HFConfig:
    """A `config.json` that remembers which of its keys a family has read."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, `default` where it is absent or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def defaults(self, **values: Any) -> None:
        """What transformers assumes where the file does not have a key (null counts as having it)."""
        self._values = values | self._values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"config.json has no {key!r}, which {self.model_type} models need")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; without a default, one that the file must have."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {key}={value!r} must be a whole number of at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        return _number(key, self.get(key, default))

    def require(self, key: str, allowed: tuple, default: Any = None) -> None:
        """Refuse a value we do not compute."""
        value = self.get(key, default)
        if value not in allowed:
            options = ", ".join(map(repr, allowed))
            raise CheckpointError(
                f"config.json: {key}={value!r} is not supported for {self.model_type} models (supported: {options})"
            )

    def skip(self, *beginnings: str) -> None:
        """Keys that begin so say nothing about this model: settings of parts that it does not have."""
        self._read |= {key for key in self._values if key.startswith(beginnings)}

    @property
    def model_type(self) -> str:
        return self._values.get("model_type", "")

    def sliding(self, default: Sequence[bool]) -> tuple[bool, ...]:
        """Which layers attend through a window: `layer_types`, or `default` where the file has none."""
        kinds = self.get("layer_types")
        if kinds is None:
            return tuple(default)
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise CheckpointError(
                    f"config.json: {kind!r} in layer_types is not supported for {self.model_type} models "
                    "(supported: full_attention, sliding_attention)"
                )
        return tuple(kind == "sliding_attention" for kind in kinds)

    def activation(self, key: str, default: str) -> str:
        """The activation's name here."""
        self.require(key, tuple(ACTIVATIONS), default)
        return ACTIVATIONS[self.get(key, default)]

    def rope(
        self,
        default_theta: float = 10_000.0,
        *,
        theta_key: str = "rope_theta",
        layer_type: str | None = None,
        partial: float | None = None,
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> RopeConfig:
        """Rotary settings, from the published style (rope_theta, rope_scaling) or transformers 5's rope_parameters.

        With `layer_type`, rope_parameters may have a table for each type of layer, and rope_scaling is that of the
        layers with full attention. `partial` is the default of partial_rotary_factor, None for families without one.
        `aliases` are other names of rope types.
        """
        longest = self.count("max_position_embeddings")
        theta, outer_original = self.get(theta_key), self.get("original_max_position_embeddings")
        scaling = {}
        for key in ("rope_parameters",) if layer_type == "sliding_attention" else ("rope_scaling", "rope_parameters"):
            given = self.get(key) or {}
            if not isinstance(given, dict):
                raise CheckpointError(f"config.json: {key}={given!r} is not a table of settings")
            if layer_type is not None and "full_attention" in given:
                given = given.get(layer_type) or {}
            scaling |= given
        if partial is not None:
            outer = self.get("partial_rotary_factor")  # transformers 5 writes both
            partial = scaling.pop("partial_rotary_factor", None) or outer or partial
        theta = scaling.pop("rope_theta", None) or theta or default_theta
        legacy_type = scaling.pop("type", None)
        kind = scaling.pop("rope_type", None) or legacy_type or "default"
        kind = aliases.get(kind, kind)
        if kind not in ROPE_TYPES:
            raise CheckpointError(
                f"config.json: rope_type={kind!r} is not supported (supported: {', '.join(ROPE_TYPES)})"
            )
        fields = RopeConfig.__dataclass_fields__.keys() - {"partial_rotary_factor"}
        unknown = sorted(k for k, v in scaling.items() if k not in fields and v is not None and v != NEUTRAL.get(k))
        if unknown:
            raise CheckpointError(f"config.json: rope setting {unknown[0]}={scaling[unknown[0]]!r} is not supported")
        values = {k: _rope_value(k, v) for k, v in scaling.items() if v is not None and k in fields}
        if kind in ("yarn", "llama3", "longrope"):
            values.setdefault("original_max_position_embeddings", outer_original or longest)
        needed = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
            "longrope": ("short_factor", "long_factor"),
        }
        for key in needed.get(kind, ()):
            if key not in values:
                raise CheckpointError(f"config.json: rope_type {kind!r} needs {key!r}")
        return RopeConfig(
            **{
                **values,
                "rope_theta": float(_number("rope_theta", theta)),
                "rope_type": kind,
                "max_position_embeddings": longest,
                "partial_rotary_factor": 1.0 if partial is None else _number("partial_rotary_factor", partial),
            }
        )

    def finish(self) -> None:
        """Complain about what no family code read: an error for keys known to change the maths, else one warning."""
        left = {
            key: value
            for key, value in self._values.items()
            if key not in self._read and key not in HARMLESS and value not in (None, False, {}, [])
        }
        for key, value in left.items():
            if key in CHANGES_MATHS and value != NEUTRAL.get(key):
                raise CheckpointError(f"config.json: {key}={value!r} is not supported for {self.model_type} models")
        unknown = {key: value for key, value in left.items() if key not in CHANGES_MATHS}
        if unknown:
            names = ", ".join(f"{k}={v!r}"[:80] for k, v in unknown.items())
            warnings.warn(f"config.json keys without a meaning here are ignored: {names}", stacklevel=3)


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {key}={value!r} must be a number")
    return value


def _rope_value(key: str, value: Any) -> Any:
    """Numbers, and the two settings that are none: lists of divisors, and `truncate`."""
    if key in ("short_factor", "long_factor") and isinstance(value, list):
        return tuple(_number(key, item) for item in value)
    return value if key == "truncate" and isinstance(value, bool) else _number(key, value)
