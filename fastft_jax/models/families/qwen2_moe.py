"""Qwen1.5-MoE, Qwen2-57B-A14B: many small experts, and a shared one behind a sigmoid gate. arXiv:2407.10671."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.experts import QWEN_NAMES, dense_layers, experts
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable(modules=QWEN_NAMES)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632)
    layers, below = hf.count("num_hidden_layers"), hf.get("max_window_layers", 28)
    hf.get("sliding_window")  # 0 or a number where it is not used
    window = hf.count("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    sliding = hf.sliding([i % 2 == 0 and i < below for i in range(layers)])
    return common(
        hf,
        qkv_bias=hf.get("qkv_bias", True),
        layer_windows=tuple(window if slides else None for slides in sliding),
        experts=experts(
            hf,
            "num_experts",
            "moe_intermediate_size",
            normalise=hf.get("norm_topk_prob", False),
            shared_intermediate_size=hf.count("shared_expert_intermediate_size"),
            dense_layers=dense_layers(hf),
        ),
    )
