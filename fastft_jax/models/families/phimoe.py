"""Phi-3.5-MoE: 16 experts, two a token chosen one after the other; LayerNorm, biases. arXiv:2404.14219, 2409.12136."""

from collections.abc import Mapping
from typing import Any

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.experts import MIXTRAL_NAMES, experts
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable(modules=MIXTRAL_NAMES)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(num_local_experts=16, num_experts_per_tok=2)
    hf.require("num_experts_per_tok", (2,))  # the router picks one, then another
    hf.get("input_jitter_noise")  # while training: see models/router.py
    window = None if hf.get("sliding_window") is None else hf.count("sliding_window")
    bias = hf.get("attention_bias", False)
    epsilon = hf.number("router_jitter_noise", 0.01)
    return common(
        hf,
        norm="layer",
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        head_bias=hf.get("lm_head_bias", False),
        rope=hf.rope(1e6),
        layer_windows=(window,) * hf.count("num_hidden_layers"),
        experts=experts(hf, "num_local_experts", "intermediate_size", router="sparsemixer", router_epsilon=epsilon),
    )


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json with the factor on longrope's cos and sin under its usual name.

    It is given twice, for short and for long texts; released files have it equal. Up to the original context the table
    is then transformers'; beyond it transformers 5 goes on with the short divisors, where the publisher's own code, and
    this, turn to the long ones.
    """
    changed = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(given := values.get(key), dict) and {"short_mscale", "long_mscale"} & given.keys():
            short, long = given.get("short_mscale"), given.get("long_mscale")
            if short != long:
                raise CheckpointError(
                    f"config.json: {key} with short_mscale={short!r} and long_mscale={long!r} is not supported: "
                    "they must be equal"
                )
            rest = {k: v for k, v in given.items() if k not in ("short_mscale", "long_mscale")}
            changed[key] = rest | {"attention_factor": short}
    return {**values, **changed}
