"""GPT-OSS 20B, 120B: windows in every other layer, attention sinks, experts with biases and clamped gates, published in
MXFP4. OpenAI 2025, arXiv:2508.10925."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.experts import experts
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable
from fastft_jax.pallas_kernels.glu.activations import CLAMP_ALPHA, CLAMP_LIMIT

GATE_UP, DOWN = "mlp.experts.{}.gate_up_proj", "mlp.experts.{}.down_proj"
NAMES = NameTable(
    modules={
        "mlp.experts.gate_up_proj": GATE_UP,
        "mlp.experts.down_proj": DOWN,
        # as users call its halves
        "mlp.experts.gate_proj": GATE_UP,
        "mlp.experts.up_proj": GATE_UP,
    },
    fused_experts=True,
)
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(num_local_experts=128, num_experts_per_tok=4, head_dim=64, max_position_embeddings=131072)
    if "rope_scaling" not in hf:
        hf.defaults(rope_parameters=YARN | {"original_max_position_embeddings": 4096})
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("swiglu_limit", (CLAMP_LIMIT,), CLAMP_LIMIT)
    hf.require("swiglu_alpha", (CLAMP_ALPHA,), CLAMP_ALPHA)
    picked = hf.count("num_experts_per_tok")
    hf.require("experts_per_token", (picked,), picked)  # published beside it
    hf.get("initial_context_length")  # published; the rope settings say it, too
    layers, window = hf.count("num_hidden_layers"), hf.count("sliding_window", 128)
    sliding = hf.sliding([i % 2 == 0 for i in range(layers)])
    bias = hf.get("attention_bias", True)
    return common(
        hf,
        rms_norm_eps=hf.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        attention_sinks=True,
        activation="clamped_silu",
        fused_gate_up=True,
        rope=hf.rope(150_000.0),
        layer_windows=tuple(window if slides else None for slides in sliding),
        experts=experts(hf, "num_local_experts", "intermediate_size", bias=True),
    )
