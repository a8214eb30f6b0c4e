"""InternLM3: Llama with biases of its own choice and dynamic rope. https://huggingface.co/internlm/internlm3-8b-instruct."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.get("bias", False)
    return common(hf, qkv_bias=hf.get("qkv_bias", False), o_bias=bias, mlp_bias=bias)
