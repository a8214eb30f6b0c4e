"""Tiny random checkpoints made by transformers, one for each family and each of its odd features."""

from pathlib import Path

COMMON = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
PARTIAL_LONGROPE = {key: value for key, value in LONGROPE.items() if key != "factor"} | {
    "short_factor": LONGROPE["short_factor"][:6],
    "long_factor": LONGROPE["long_factor"][:6],
    "partial_rotary_factor": 0.75,
}


def _theta(theta: float, **scaling) -> dict:
    return {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta}}


# name -> (model_type, arguments of transformers' config class)
TINY: dict[str, tuple[str, dict]] = {
    "llama-1": ("llama", dict(num_key_value_heads=4)),
    "llama-2": ("llama", dict()),
    "llama-2-linear": ("llama", _theta(1e4, rope_type="linear", factor=2.0)),
    "llama-2-dynamic": ("llama", _theta(1e4, rope_type="dynamic", factor=2.0) | dict(max_position_embeddings=24)),
    "llama-2-yarn": ("llama", _theta(1e4, **YARN)),
    "llama-longrope": ("llama", _theta(1e4, **LONGROPE)),
    "llama-3": ("llama", _theta(5e5)),
    "llama-3.1": ("llama", _theta(5e5, **LLAMA3)),
    "llama-3.2-tied": ("llama", _theta(5e5, **LLAMA3) | dict(tie_word_embeddings=True, head_dim=24)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral-7b-v0.1": ("mistral", dict(sliding_window=8)),
    "mistral-7b-v0.3": ("mistral", dict(sliding_window=None) | _theta(1e6)),
    "mistral-nemo": ("mistral", dict(sliding_window=None, head_dim=24)),
    "qwen-1.5": ("qwen2", dict(num_key_value_heads=4)),
    "qwen-2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen-2.5-tied": ("qwen2", dict(tie_word_embeddings=True) | _theta(1e6)),
    "qwen-3": ("qwen3", dict(head_dim=24) | _theta(1e6)),
    "qwen-3-tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "gemma": ("gemma", dict(head_dim=24, num_hidden_layers=2)),
    "gemma-2": (
        "gemma2",
        dict(
            head_dim=24,
            num_hidden_layers=2,
            sliding_window=8,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
        ),
    ),
    "gemma-3": (
        "gemma3_text",
        dict(
            head_dim=24,
            sliding_window=8,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        ),
    ),
    "phi-3": ("phi3", dict(num_hidden_layers=2, sliding_window=8, pad_token_id=0)),
    "phi-4-mini": (
        "phi3",
        dict(num_hidden_layers=2, tie_word_embeddings=True, pad_token_id=0, original_max_position_embeddings=16)
        | _theta(1e4, **PARTIAL_LONGROPE),
    ),
    "phi-2": ("phi", dict(num_hidden_layers=2, num_key_value_heads=4) | _theta(1e4, partial_rotary_factor=0.5)),
    "granite": (
        "granite",
        dict(
            num_hidden_layers=2,
            tie_word_embeddings=True,
            embedding_multiplier=3.0,
            residual_multiplier=0.22,
            attention_multiplier=0.1,
            logits_scaling=4.0,
        ),
    ),
    "granite-4-dense": (
        "granitemoehybrid",
        dict(
            num_hidden_layers=2,
            num_local_experts=0,
            shared_intermediate_size=80,
            layer_types=["full_attention"] * 2,
            position_embedding_type="rope",
            embedding_multiplier=3.0,
            residual_multiplier=0.22,
            attention_multiplier=0.1,
            logits_scaling=4.0,
        ),
    ),
    "smollm-3": ("smollm3", dict(no_rope_layers=[1, 1, 0], pad_token_id=0)),
    "olmo-2": ("olmo2", dict(num_hidden_layers=2)),
    "olmo-3": (
        "olmo3",
        dict(
            num_hidden_layers=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": YARN | {"rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ),
    "cohere-2": (
        "cohere2",
        dict(num_hidden_layers=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    "cohere": ("cohere", dict(num_hidden_layers=2, logit_scale=0.25)),
    "stablelm": ("stablelm", dict(num_hidden_layers=2, use_qkv_bias=True) | _theta(1e4, partial_rotary_factor=0.25)),
    "stablelm-parallel": (
        "stablelm",
        dict(num_hidden_layers=2, use_parallel_residual=True) | _theta(1e4, partial_rotary_factor=0.25),
    ),
}
DEEPSEEK = dict(
    num_hidden_layers=2,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    first_k_dense_replace=0,
    n_group=4,
    topk_group=2,
)
# mixtures of experts: tests/models/test_moe.py
EXPERTS: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", dict(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "qwen-2-moe": (
        "qwen2_moe",
        dict(
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=80,
            num_hidden_layers=2,
            mlp_only_layers=[0],
        ),
    ),
    "qwen-3-moe": (
        "qwen3_moe",
        dict(
            num_hidden_layers=2,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            head_dim=24,
        ),
    ),
    "gpt-oss": (
        "gpt_oss",
        dict(
            num_hidden_layers=1,  # with a window; test_gpt_oss.py has a second one without
            num_local_experts=4,
            num_experts_per_tok=2,
            intermediate_size=48,
            head_dim=24,
            sliding_window=8,
            output_router_logits=True,
            router_aux_loss_coef=5.0,
        )
        | _theta(150000.0, **YARN, truncate=False),
    ),
    "phi-3.5-moe": (
        "phimoe",
        dict(
            num_hidden_layers=2,
            num_local_experts=4,
            router_jitter_noise=0.2,
            attention_bias=True,
            lm_head_bias=True,
            original_max_position_embeddings=64,
            rope_parameters={key: value for key, value in LONGROPE.items() if key != "factor"}
            | {"original_max_position_embeddings": 64, "rope_theta": 1e4, "short_mscale": 1.2, "long_mscale": 1.2},
        ),
    ),
    "deepseek-v2": (  # with V2-Lite's queries
        "deepseek_v2",
        DEEPSEEK
        | dict(q_lora_rank=None, topk_method="group_limited_greedy", routed_scaling_factor=4.0, attention_bias=True)
        | _theta(1e4, **YARN, mscale=0.7, mscale_all_dim=0.7),
    ),
    "deepseek-v3": (
        "deepseek_v3",
        DEEPSEEK | dict(first_k_dense_replace=1) | _theta(1e4, **YARN, mscale=1.0, mscale_all_dim=0.5),
    ),
}


def make_model(name: str, **changes):
    """The tiny transformers model, float32, in eval mode; every parameter random (biases and norms too)."""
    import torch
    import transformers

    model_type, arguments = (TINY | EXPERTS)[name]
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **arguments, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if model_type == "gpt_oss" and "gate_up_proj" in parameter_name:
                parameter.normal_(0, 0.5)  # so that some are beyond the clamp
            elif "router" in parameter_name or parameter_name.endswith(("mlp.gate.weight", "expert_gate.weight")):
                parameter.normal_(0, 0.05)  # softmax not saturated, and no two experts' scores nearly equal
            elif "norm" in parameter_name and parameter_name.endswith("weight"):
                middle = 0.0 if model_type.startswith("gemma") else 1.0  # Gemma multiplies by 1 + w
                parameter.uniform_(middle - 0.5, middle + 0.5)
            else:
                parameter.normal_(0, 0.15)  # far enough from linear that a wrong rotation or mask shows
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)  # as wide as the scores' own differences
    return model.eval()


def save(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder
