"""Gemma 1: wide heads, a tanh-GELU gate, norms that multiply by 1 + w, a scaled embedding. arXiv:2403.08295."""

import math
from typing import Any

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def gemma(hf: HFConfig, **family: Any) -> DecoderConfig:
    """What all Gemmas share."""
    bias = hf.get("attention_bias", False)
    fields = {
        "norm": "rms_plus_one",
        "activation": "gelu_tanh",
        "embedding_scale": math.sqrt(hf.count("hidden_size")),
        "qkv_bias": bias,
        "o_bias": bias,
    }
    return common(hf, **(fields | family))


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(head_dim=256, tie_word_embeddings=True, max_position_embeddings=8192)
    # the releases say "gelu" and mean the tanh form, which is what transformers computes
    for key in ("hidden_act", "hidden_activation"):
        hf.require(key, ("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
    return gemma(hf)
