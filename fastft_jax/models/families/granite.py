"""Granite 3 dense: Llama with four multipliers. IBM 2024, https://github.com/ibm-granite/granite-3.0-language-models."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.get("attention_bias", False)
    return common(
        hf,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        embedding_scale=hf.number("embedding_multiplier", 1.0),
        residual_multiplier=hf.number("residual_multiplier", 1.0),
        attention_scale=hf.number("attention_multiplier", 1.0),
        logit_scale=1.0 / hf.number("logits_scaling", 1.0),
    )
