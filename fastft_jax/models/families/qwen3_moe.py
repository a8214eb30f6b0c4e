"""Qwen3-30B-A3B, 235B-A22B: Qwen3 with 128 experts, 8 a token, and no shared one. arXiv:2505.09388."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.experts import QWEN_NAMES, dense_layers, experts
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable(modules=QWEN_NAMES)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    # transformers 5 writes num_experts under Mixtral's name, too
    hf.defaults(num_experts=hf.get("num_local_experts", 128), num_experts_per_tok=8, moe_intermediate_size=768)
    bias = hf.get("attention_bias", False)
    hf.get("max_window_layers")  # published, and not used: a window is every layer's
    window = hf.count("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    hf.get("sliding_window")
    return common(
        hf,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        layer_windows=(window,) * hf.count("num_hidden_layers"),
        experts=experts(
            hf,
            "num_experts",
            "moe_intermediate_size",
            normalise=hf.get("norm_topk_prob", False),
            dense_layers=dense_layers(hf),
        ),
    )
