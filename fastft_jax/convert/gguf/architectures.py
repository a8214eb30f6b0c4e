"""Which of our families llama.cpp computes, under what name, and what of a decoder it needs to be told.

A family is here when llama.cpp's graph for it computes what ours does (llama.cpp 0c1e57098, src/models/*.cpp, read and,
in the tests, run). What a graph hard-codes is checked against the decoder, so that a checkpoint which differs is
refused instead of exported wrongly; what it leaves out for good (a sliding window) is a warning.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fastft_jax.convert.gguf.deepseek import WITHOUT_LORA, add_deepseek_hyperparameters, deepseek_differences
from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig, RopeConfig
from fastft_jax.models.rope import llama3_divisors, rope_tables


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's name for a family, and how its graph differs from Llama's."""

    name: str
    permuted: bool = False  # q and k rotate pairs of neighbours: their rows are interleaved
    layer_norm: bool = False  # epsilon of LayerNorm, not of RMSNorm
    window_every: int | None = None  # windows are applied; by default in all but every n-th layer
    longrope: bool = False
    scales: bool = False  # Granite's four multipliers
    biases: frozenset[str] = frozenset()  # "qkv", "o", "mlp": those it adds
    activation: str = "silu"
    normalised: bool | None = None  # experts' weights are divided by their sum; None: no experts, or as the file says
    own_names: tuple[tuple[str, str], ...] = ()  # where a module is called otherwise than in MODULES
    without_lora: frozenset[str] = frozenset()  # modules whose adapters are ignored


_ALL = frozenset(("qkv", "o", "mlp"))
_QKV = frozenset(("qkv",))
_GELU = "gelu_tanh"
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True, biases=_ALL),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2", biases=_QKV),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", activation=_GELU),
    "gemma2": Architecture("gemma2", window_every=2, activation=_GELU),
    "gemma3_text": Architecture("gemma3", window_every=6, activation=_GELU),
    "gemma3": Architecture("gemma3", window_every=6, activation=_GELU),
    "phi3": Architecture("phi3", longrope=True),
    "phi": Architecture("phi2", layer_norm=True, biases=_ALL, activation=_GELU),
    "granite": Architecture("granite", permuted=True, scales=True, biases=_ALL),
    "granitemoehybrid": Architecture("granite", permuted=True, scales=True, biases=_ALL),
    "internlm2": Architecture("internlm2", permuted=True, biases=_QKV),
    "internlm3": Architecture("llama", permuted=True, biases=_ALL),
    "smollm3": Architecture("smollm3", permuted=True),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2", window_every=4),
    "cohere": Architecture("command-r", layer_norm=True),
    "cohere2": Architecture("cohere2", layer_norm=True, window_every=4),
    "stablelm": Architecture("stablelm", layer_norm=True, biases=_QKV),
    "mixtral": Architecture("llama", permuted=True, normalised=True),
    "qwen2_moe": Architecture("qwen2moe", biases=_QKV, normalised=False),
    "qwen3_moe": Architecture("qwen3moe", normalised=True),
    "phimoe": Architecture("phimoe", biases=_ALL, normalised=True),  # to be refused with what differs
    "gpt_oss": Architecture(
        "gpt-oss",
        window_every=2,
        biases=frozenset(("qkv", "o")),
        activation="clamped_silu",
        normalised=True,
        own_names=(("post_attention_layernorm", "post_attention_norm"),),
    ),
    "deepseek_v2": Architecture("deepseek2", without_lora=WITHOUT_LORA),
    "deepseek_v3": Architecture("deepseek2", without_lora=WITHOUT_LORA),
}

# ours -> GGUF's; layers' names stand under blk.N.
TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "attention_output_norm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",  # the gate's rows first, as ours
    "mlp.down_proj": "ffn_down",
    "mlp_output_norm": "post_ffw_norm",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
PARAMETERS = {"self_attn.sinks": "attn_sinks.weight", "mlp.router.e_score_correction_bias": "exp_probs_b.bias"}


def architecture_of(config: DecoderConfig) -> Architecture:
    """How llama.cpp runs this decoder. CheckpointError where it cannot, or would compute something else."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise CheckpointError(
            f"GGUF: model_type={config.model_type!r} cannot be written (can be: {', '.join(ARCHITECTURES)})"
        )
    for wrong in _differences(config, found):
        raise CheckpointError(
            f"GGUF: llama.cpp's {found.name!r} does not compute this model: {wrong}; export merged_16bit instead"
        )
    window = max((w for w in config.layer_windows if w), default=None)
    if window and found.window_every is None:
        warnings.warn(
            f"llama.cpp ignores the sliding window of {config.model_type} models: its results are this model's for "
            f"texts of up to {window} tokens",
            stacklevel=3,
        )
    if config.rope.rope_type == "dynamic":
        warnings.warn(
            "llama.cpp ignores dynamic rope scaling: its results are this model's for texts of up to "
            f"{config.max_position_embeddings} tokens",
            stacklevel=3,
        )
    if found.name == "gpt-oss" and not _ramp_is_the_same(config):
        warnings.warn(
            "llama.cpp rounds the bounds between which yarn blends frequencies (truncate=False says not to), in every "
            "GGUF file of GPT-OSS: its results are near this model's, not equal",
            stacklevel=3,
        )
    return found


def tensor_name(path: str, layer: int | None, architecture: Architecture) -> str:
    """Our `self_attn.q_proj.weight` of layer 3 -> `blk.3.attn_q.weight`."""
    module, _, kind = path.rpartition(".")
    if layer is None:
        return f"{TOP[module]}.{kind}"
    own = dict(architecture.own_names)
    return f"blk.{layer}." + (PARAMETERS.get(path) or f"{own.get(module) or MODULES[module]}.{kind}")


def shape_there(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape as llama.cpp has it: the gate of a shared expert [1, D] is a vector."""
    return shape[1:] if path == "mlp.shared_expert_gate.weight" else shape


def to_llama_cpp(
    path: str, w: Float[np.ndarray, "N ..."], config: DecoderConfig, architecture: Architecture
) -> Float[np.ndarray, "N ..."]:
    """A tensor's values as llama.cpp wants them: q and k rows interleaved, Gemma's norms with their 1 added; of the
    shape `shape_there`."""
    module, _, _ = path.rpartition(".")
    if architecture.permuted and module in ("self_attn.q_proj", "self_attn.k_proj"):
        return interleave(w, heads_of(module, config))
    if config.norm == "rms_plus_one" and module.endswith("norm"):
        return w + np.float32(1)
    return w.reshape(shape_there(path, w.shape))


def from_llama_cpp(
    path: str, w: Float[np.ndarray, "N ..."], config: DecoderConfig, architecture: Architecture
) -> Float[np.ndarray, "N ..."]:
    """The inverse of `to_llama_cpp`."""
    module, _, _ = path.rpartition(".")
    if architecture.permuted and module in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = heads_of(module, config)
        return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    if config.norm == "rms_plus_one" and module.endswith("norm"):
        return w - np.float32(1)
    return w


def interleave(w: Float[np.ndarray, "N ..."], heads: int) -> Float[np.ndarray, "N ..."]:
    """Rows of each head from two halves to pairs of neighbours: what rotates together lies together."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def heads_of(module: str, config: DecoderConfig) -> int:
    return config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads


def add_hyperparameters(
    writer: gguf.GGUFWriter, config: DecoderConfig, architecture: Architecture, context: int | None = None
) -> None:
    """Everything llama.cpp reads of the model but its vocabulary. `context` replaces max_position_embeddings."""
    c = config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(context or c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads if c.latent is None else 1)
    if c.latent is None:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    else:
        add_deepseek_hyperparameters(writer, c)
    writer.add_vocab_size(c.vocab_size)
    (writer.add_layer_norm_eps if architecture.layer_norm else writer.add_layer_norm_rms_eps)(c.rms_norm_eps)
    _add_rope(writer, c, architecture)
    if c.experts is not None:
        writer.add_expert_count(c.experts.num_experts)
        writer.add_expert_used_count(c.experts.top_k)
        writer.add_expert_feed_forward_length(c.experts.intermediate_size)
        if c.experts.shared_intermediate_size is not None and c.latent is None:
            writer.add_expert_shared_feed_forward_length(c.experts.shared_intermediate_size)
    if architecture.window_every and any(c.layer_windows):
        sliding = [window is not None for window in c.layer_windows]
        writer.add_sliding_window(max(filter(None, c.layer_windows)))
        if sliding != [(i + 1) % architecture.window_every != 0 for i in range(len(sliding))]:
            writer.add_sliding_window_pattern(sliding)
    elif architecture.name == "phi3":
        writer.add_sliding_window(0)  # a required key; llama.cpp ignores other values
    if c.attention_softcap is not None:
        writer.add_attn_logit_softcapping(c.attention_softcap)
    if c.final_softcap is not None:
        writer.add_final_logit_softcapping(c.final_softcap)
    if architecture.scales:
        writer.add_embedding_scale(c.embedding_scale)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_attention_scale(c.attention_scale)
        writer.add_logit_scale(1 / c.logit_scale)  # llama.cpp divides by Granite's
    elif c.logit_scale != 1.0:
        writer.add_logit_scale(c.logit_scale)
    if architecture.name == "stablelm":
        writer.add_parallel_residual(c.block == "parallel")


def _add_rope(writer: gguf.GGUFWriter, c: DecoderConfig, architecture: Architecture) -> None:
    rope = c.rope
    writer.add_rope_dimension_count(rope.rotary_dim(c.rope_dim))
    writer.add_rope_freq_base(rope.rope_theta)
    if c.second_rope is not None and c.second_rope.rope_type == "default" and architecture.window_every:
        writer.add_rope_freq_base_swa(c.second_rope.rope_theta)
    if rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(_yarn_factor(rope))
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow or 1.0)
    elif rope.rope_type == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(_longrope_attention(rope))
    elif architecture.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(c.max_position_embeddings)
    elif architecture.name in ("command-r", "cohere2"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def extra_tensors(config: DecoderConfig) -> Iterator[tuple[str, Float[np.ndarray, "P/2"]]]:
    """(name, float32 divisors of the rotary frequencies), one a rotated pair, for the scalings that need them."""
    rope = config.rope
    if rope.rope_type == "llama3":
        yield "rope_freqs.weight", llama3_divisors(rope, config.head_dim)
    elif rope.rope_type == "longrope":
        yield "rope_factors_long.weight", np.asarray(rope.long_factor, np.float32)
        yield "rope_factors_short.weight", np.asarray(rope.short_factor, np.float32)


def _differences(c: DecoderConfig, architecture: Architecture) -> Iterator[str]:
    """What of the decoder llama.cpp's graph has otherwise, in words."""
    rope, name = c.rope, architecture.name
    if c.experts is not None:
        yield from _expert_differences(c, architecture)
    if rope.rope_type == "longrope" and not architecture.longrope:
        yield "longrope"
    if c.latent is not None:
        yield from deepseek_differences(c)
    elif rope.rope_type == "yarn":
        standard = rope.attention_factor is None or math.isclose(
            rope.attention_factor, 0.1 * math.log(_yarn_factor(rope)) + 1, rel_tol=1e-6
        )
        if not standard or (rope.mscale and rope.mscale_all_dim) or (not rope.truncate and name != "gpt-oss"):
            yield "yarn with an own attention_factor, mscale or truncate"
    if c.head_bias and name != "phi2":
        yield "a bias of lm_head"
    if c.activation != architecture.activation:
        yield f"activation {c.activation!r}"
    for kind in sorted({"qkv": c.qkv_bias, "o": c.o_bias, "mlp": c.mlp_bias}.items()):
        if kind[1] and kind[0] not in architecture.biases:
            yield f"biases of {kind[0]} projections"
    if name in ("gemma2", "gemma3"):
        big = c.num_hidden_layers == (46 if name == "gemma2" else 62)  # 27B: by the layers' count, as llama.cpp
        width = c.hidden_size // c.num_attention_heads if big else c.head_dim
        if not math.isclose(c.attention_scale, width**-0.5, rel_tol=1e-6):
            yield f"query_pre_attn_scalar={c.attention_scale**-2:g} (there it is {width})"
    if name == "smollm3":
        plain = tuple(i for i in range(c.num_hidden_layers) if i % 4 == 3)
        if (c.second_rope_layers if c.second_rope else ()) != plain:
            yield "layers without rotary embedding that are not every fourth"
    if name == "cohere2" and c.second_rope_layers != tuple(i for i, w in enumerate(c.layer_windows) if w is None):
        yield "rotary embedding in layers without a window"
    if name == "olmo2" and c.second_rope is not None and c.second_rope.rope_type != "default":
        yield "scaled rotary embedding in layers with a window"
    if name in ("qwen2moe", "internlm2") and c.tie_word_embeddings:
        yield "a head that is tied to the embedding"
    if name in ("granite", "internlm2", "qwen2moe") and c.head_dim * c.num_attention_heads != c.hidden_size:
        yield f"head_dim={c.head_dim}"
    if name == "gpt-oss":
        if c.tie_word_embeddings:
            yield "a head that is tied to the embedding"
        if not c.o_bias:
            yield "attention without biases"
        if not any(c.layer_windows):
            yield "no layer with a sliding window"
    if len({w for w in c.layer_windows if w}) > 1:
        yield "windows of different lengths"


def _expert_differences(c: DecoderConfig, architecture: Architecture) -> Iterator[str]:
    e = c.experts
    if architecture.name == "deepseek2":
        return  # convert/gguf/deepseek.py
    if e.router != "softmax":
        yield f"experts weighted by {e.router!r} (there by softmax), and LayerNorm (there RMSNorm)"
    if e.normalise != architecture.normalised:
        yield f"norm_topk_prob={e.normalise} (there it is {architecture.normalised})"
    if e.dense_layers:
        yield f"layers without experts ({', '.join(map(str, e.dense_layers))})"


def _ramp_is_the_same(c: DecoderConfig) -> bool:
    """Whether yarn's bounds may be rounded without any frequency changing."""
    if c.rope.rope_type != "yarn" or c.rope.truncate:
        return True
    one = jnp.ones((1, 1), jnp.int32)
    (_, ours), (_, theirs) = (rope_tables(r, c.rope_dim, one) for r in (c.rope, replace(c.rope, truncate=True)))
    return np.allclose(ours, theirs, rtol=1e-6, atol=0)


def _yarn_factor(rope: RopeConfig) -> float:
    return rope.factor or rope.max_position_embeddings / rope.original_max_position_embeddings


def _longrope_attention(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = rope.factor or rope.max_position_embeddings / rope.original_max_position_embeddings
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_max_position_embeddings))
