"""Which families there are: `model_type` in config.json -> the module that describes it."""

import importlib
from collections.abc import Mapping
from typing import Any

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.names import NameTable

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3"),
    *("gemma", "gemma2", "gemma3_text", "gemma3"),
    *("phi3", "phi", "granite", "smollm3", "olmo2", "olmo3", "cohere", "cohere2", "stablelm"),
    *("deepseek_v2", "deepseek_v3"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "phimoe"),
    *("gpt_oss", "internlm2", "internlm3", "granitemoehybrid"),
)


def config_from_hf(values: Mapping[str, Any]) -> tuple[DecoderConfig, NameTable]:
    """The decoder and the tensor names that a `config.json` describes; CheckpointError for what is not supported."""
    hf = HFConfig(values)
    if hf.model_type not in FAMILIES:
        remote = " It also asks for trust_remote_code, which is never run here." if "auto_map" in values else ""
        raise CheckpointError(
            f"config.json: model_type={hf.model_type!r} is not supported (supported: {', '.join(FAMILIES)}).{remote}"
        )
    family = importlib.import_module(f"fastft_jax.models.families.{hf.model_type}")
    settings = values.get("quantization_config")
    if not (family.NAMES.fused_experts and in_mxfp4(settings)):
        check_quantization(settings)
    if hasattr(family, "text_values"):  # a decoder among other parts, of which nothing else is read
        hf = HFConfig(family.text_values(values))
    config = family.config_from_hf(hf)
    hf.finish()
    _check(config)
    return config, family.NAMES


def in_mxfp4(settings: Any) -> bool:
    """Whether a `quantization_config` says that experts are in MXFP4, as GPT-OSS is published."""
    return isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"


def standalone(values: Mapping[str, Any]) -> tuple[dict[str, Any], NameTable]:
    """config.json and names under which the decoder stands by itself: other ones where it is a multimodal model's."""
    family = importlib.import_module(f"fastft_jax.models.families.{values['model_type']}")
    if not hasattr(family, "STANDALONE"):
        return dict(values), family.NAMES
    alone = importlib.import_module(f"fastft_jax.models.families.{family.STANDALONE['model_type']}")
    return {**family.text_values(values), **family.STANDALONE}, alone.NAMES


def check_quantization(settings: Any) -> None:
    """Nothing, bitsandbytes NF4 or int8 as transformers writes it, or fp8 in blocks of 128 x 128; CheckpointError for
    every other kind, with its name."""
    if not settings:
        return
    said = settings if isinstance(settings, dict) else {"quant_method": settings}
    if said.get("quant_method") == "fp8":
        return _check_fp8(said)
    method = said.get("quant_method")
    if method != "bitsandbytes":
        raise CheckpointError(
            f"config.json: quantization_config.quant_method={method!r} cannot be read yet; use the 16-bit checkpoint"
        )
    if said.get("load_in_8bit", said.get("_load_in_8bit", False)):
        return
    needed = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}
    absent = {"load_in_4bit": False, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "uint8"}  # their defaults
    for key, value in needed.items():
        found = said.get(key, said.get(f"_{key}", absent[key]))
        if found != value:
            raise CheckpointError(
                f"config.json: quantization_config.{key}={found!r} cannot be read (only {value!r}); use the 16-bit "
                "checkpoint"
            )


def _check_fp8(settings: Mapping[str, Any]) -> None:
    """One scale a block of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 have them."""
    needed = {"weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    for key, value in needed.items():
        found = settings.get(key, None if key == "weight_block_size" else value)
        if found != value:
            raise CheckpointError(
                f"config.json: quantization_config.{key}={found!r} cannot be read in fp8 (only {value!r}); use "
                "the 16-bit checkpoint"
            )


def _check(config: DecoderConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if config.rope_dim % 2:
        key = "head_dim" if config.latent is None else "qk_rope_head_dim"
        raise CheckpointError(f"config.json: {key}={config.rope_dim} is odd; rotary embedding pairs its elements")
    for rope in config.ropes:
        half = rope.rotary_dim(config.rope_dim) / 2
        if half < 1 or half != int(half):
            raise CheckpointError(
                f"config.json: partial_rotary_factor={rope.partial_rotary_factor!r} of head_dim={config.head_dim} is "
                "not a whole number of pairs"
            )
        for key in ("short_factor", "long_factor"):
            given = getattr(rope, key)
            if given is not None and len(given) != half:
                raise CheckpointError(f"config.json: {key} has {len(given)} entries, not {int(half)}: one a pair")
    experts = config.experts
    if experts is not None and experts.top_k > experts.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok={experts.top_k} is more than the {experts.num_experts} experts there are"
        )
    if len(config.layer_windows) != config.num_hidden_layers:
        raise CheckpointError(
            f"config.json: layer_types has {len(config.layer_windows)} entries for {config.num_hidden_layers} layers"
        )
