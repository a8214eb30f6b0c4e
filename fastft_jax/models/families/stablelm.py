"""StableLM 3B, Zephyr, StableLM 2 1.6B: LayerNorm, rotary embedding of a quarter of each head. arXiv:2402.17834."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.require("qk_layernorm", (False,), False)  # StableLM 2 12B has a LayerNorm for every head
    return common(
        hf,
        block="parallel" if hf.get("use_parallel_residual", False) else "pre",
        norm="layer",
        norm_bias=True,
        rms_norm_eps=hf.number("layer_norm_eps", 1e-5),
        rope=hf.rope(partial=0.25),
        qkv_bias=hf.get("use_qkv_bias", False),
    )
