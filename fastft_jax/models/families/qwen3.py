"""Qwen3 dense: RMSNorm on each query and key head, own head width. Qwen team 2025, arXiv:2505.09388."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.families.qwen2 import windows

NAMES = NameTable()


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.get("attention_bias", False)
    return common(
        hf,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        head_dim=hf.count("head_dim", 128),
        layer_windows=windows(hf),
    )
