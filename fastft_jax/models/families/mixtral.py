"""Mixtral 8x7B, 8x22B: Mistral with 8 experts, of which a token's best two share its weight. arXiv:2401.04088."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.experts import MIXTRAL_NAMES, experts
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable(modules=MIXTRAL_NAMES)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(num_local_experts=8, num_experts_per_tok=2)
    hf.require("router_jitter_noise", (0,), 0)  # noise on a layer's input while training
    window = None if hf.get("sliding_window") is None else hf.count("sliding_window")
    return common(
        hf,
        rope=hf.rope(1e6),
        layer_windows=(window,) * hf.count("num_hidden_layers"),
        experts=experts(hf, "num_local_experts", "intermediate_size"),
    )
