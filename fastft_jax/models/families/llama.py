"""Llama 1, 2, 3, 3.1, 3.2, 3.3 and their fine-tunes. Touvron et al. 2023, arXiv:2302.13971; arXiv:2407.21783."""

from typing import Any

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def common(hf: HFConfig, **family: Any) -> DecoderConfig:
    """What every Llama-shaped family shares; `family` gives or overrides DecoderConfig's fields."""
    heads, layers, width = (hf.count(key) for key in ("num_attention_heads", "num_hidden_layers", "hidden_size"))
    if "activation" not in family:
        hf.require("hidden_act", ("silu", "swish"), "silu")
    if hf.get("head_dim") is None and "head_dim" not in family and width % heads:
        raise CheckpointError(f"config.json: hidden_size={width} is not a multiple of num_attention_heads={heads}")
    fields = {
        "model_type": hf.model_type,
        "vocab_size": hf.count("vocab_size"),
        "hidden_size": width,
        "intermediate_size": hf.count("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": hf.count("num_key_value_heads", heads),
        "head_dim": hf.count("head_dim", width // heads or 1),
        "rms_norm_eps": hf.number("rms_norm_eps", 1e-6),
        "max_position_embeddings": hf.count("max_position_embeddings"),
        "rope": family.get("rope") or hf.rope(),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "layer_windows": (None,) * layers,
    }
    return DecoderConfig(**(fields | family))


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    attention_bias = hf.get("attention_bias", False)
    return common(hf, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=hf.get("mlp_bias", False))
