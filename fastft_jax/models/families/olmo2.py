"""OLMo 2: norms on the blocks' outputs only, q/k norm over all heads at once. arXiv:2501.00656."""

from typing import Any

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

OUTPUT_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
NAMES = NameTable(modules=OUTPUT_NORMS)


def olmo2(hf: HFConfig, **family: Any) -> DecoderConfig:
    """What OLMo 2 and 3 share."""
    bias = hf.get("attention_bias", False)
    eps = hf.number("rms_norm_eps", 1e-5)
    return common(hf, block="post", qk_norm="projection", rms_norm_eps=eps, qkv_bias=bias, o_bias=bias, **family)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    return olmo2(hf)
