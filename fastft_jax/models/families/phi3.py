"""Phi-3, 3.5-mini, 4, 4-mini: Llama with fused projections, longrope, partial rotary (4-mini). arXiv:2404.14219."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.require("attention_bias", (False,), False)
    hf.require("mlp_bias", (False,), False)
    for key in ("full_attn_mod", "interpolate_factor"):  # 4-mini's file has them, with the value that does nothing
        hf.require(key, (1,), 1)
    window = None if hf.get("sliding_window") is None else hf.count("sliding_window")
    return common(
        hf,
        fused_projections=True,
        rms_norm_eps=hf.number("rms_norm_eps", 1e-5),
        rope=hf.rope(partial=1.0, aliases={"su": "longrope", "yarn": "longrope"}),
        layer_windows=(window,) * hf.count("num_hidden_layers"),
    )
