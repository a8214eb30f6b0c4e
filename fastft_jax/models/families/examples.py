"""One released model of each family, as its config.json has it: what the table of families is made from."""

from typing import Any, NamedTuple


class Example(NamedTuple):
    """releases: what people know of the family; name and values: one of them, what of its file decides the maths."""

    releases: str
    name: str
    values: dict[str, Any]


_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings"),
)


def _file(sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | more


_DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}

_EXAMPLES: dict[str, Example] = {
    "llama": Example(
        "Llama 1, 2, 3 to 3.3, TinyLlama, SmolLM2, Yi, Falcon 3, R1 distills",
        "Llama-3.1-8B",
        _file(
            (4096, 14336, 32, 32, 8, 128256, 131072),
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_theta=500000.0,
            rope_scaling={
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        ),
    ),
    "mistral": Example(
        "Mistral 7B, Nemo, Small, Large",
        "Mistral-7B-v0.1",
        _file((4096, 14336, 32, 32, 8, 32000, 32768), hidden_act="silu", rms_norm_eps=1e-05, sliding_window=4096),
    ),
    "qwen2": Example(
        "Qwen1.5, 2, 2.5, R1 distills",
        "Qwen2.5-7B",
        _file(
            (3584, 18944, 28, 28, 4, 152064, 131072),
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            use_sliding_window=False,
            sliding_window=32768,
        ),
    ),
    "qwen3": Example(
        "Qwen3 dense",
        "Qwen3-8B",
        _file(
            (4096, 12288, 36, 32, 8, 151936, 40960),
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            use_sliding_window=False,
            sliding_window=32768,
            head_dim=128,
        ),
    ),
    "gemma": Example(
        "Gemma 1",
        "gemma-7b",
        _file(
            (3072, 24576, 28, 16, 16, 256000, 8192),
            hidden_act="gelu",
            rms_norm_eps=1e-06,
            head_dim=256,
            rope_theta=10000.0,
        ),
    ),
    "gemma2": Example(
        "Gemma 2",
        "gemma-2-9b",
        _file(
            (3584, 14336, 42, 16, 8, 256000, 8192),
            hidden_act="gelu_pytorch_tanh",
            rms_norm_eps=1e-06,
            head_dim=256,
            rope_theta=10000.0,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=256,
            sliding_window=4096,
        ),
    ),
    "gemma3_text": Example(
        "Gemma 3 270M, 1B",
        "gemma-3-1b-pt",
        _file(
            (1152, 6912, 26, 4, 1, 262144, 32768),
            hidden_act="gelu_pytorch_tanh",
            rms_norm_eps=1e-06,
            head_dim=256,
            rope_theta=1000000,
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=256,
            rope_local_base_freq=10000,
            sliding_window=512,
            sliding_window_pattern=6,
        ),
    ),
    "gemma3": Example(
        "Gemma 3 4B, 12B, 27B: the text decoder",
        "gemma-3-12b-pt",
        {
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 3840,
                "intermediate_size": 15360,
                "num_hidden_layers": 48,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
            }
        },
    ),
    "phi3": Example(
        "Phi-3, 3.5-mini, 4, 4-mini",
        "Phi-4-mini-instruct",
        _file(
            (3072, 8192, 32, 24, 8, 200064, 131072),
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_theta=10000.0,
            rope_scaling={"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            sliding_window=262144,
            tie_word_embeddings=True,
        ),
    ),
    "phi": Example(
        "Phi-1.5, 2",
        "phi-2",
        _file(
            (2560, 10240, 32, 32, 32, 51200, 2048),
            hidden_act="gelu_new",
            partial_rotary_factor=0.4,
            rope_theta=10000.0,
            layer_norm_eps=1e-05,
        ),
    ),
    "granite": Example(
        "Granite 3 dense",
        "granite-3.0-8b-base",
        _file(
            (4096, 12800, 40, 32, 8, 49155, 4096),
            hidden_act="silu",
            rms_norm_eps=1e-05,
            attention_multiplier=0.0078125,
            logits_scaling=16.0,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            tie_word_embeddings=True,
        ),
    ),
    "smollm3": Example(
        "SmolLM3",
        "SmolLM3-3B",
        _file(
            (2048, 11008, 36, 16, 4, 128256, 65536),
            hidden_act="silu",
            rms_norm_eps=1e-06,
            rope_theta=5000000.0,
            no_rope_layers=[1, 1, 1, 0] * 9,
            use_sliding_window=False,
        ),
    ),
    "olmo2": Example(
        "OLMo 2",
        "OLMo-2-1124-7B",
        _file((4096, 11008, 32, 32, 32, 100352, 4096), hidden_act="silu", rms_norm_eps=1e-05, rope_theta=500000.0),
    ),
    "olmo3": Example(
        "OLMo 3",
        "Olmo-3-1025-7B",
        _file(
            (4096, 11008, 32, 32, 32, 100278, 65536),
            hidden_act="silu",
            rms_norm_eps=1e-06,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
            rope_scaling={
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "yarn",
            },
            rope_theta=500000,
            sliding_window=4096,
        ),
    ),
    "cohere": Example(
        "Command-R, Aya 23",
        "c4ai-command-r-v01",
        _file(
            (8192, 22528, 40, 64, 64, 256000, 8192),
            hidden_act="silu",
            logit_scale=0.0625,
            rope_theta=8000000.0,
            tie_word_embeddings=True,
            layer_norm_eps=1e-05,
        ),
    ),
    "cohere2": Example(
        "Command-R7B, Command-A",
        "c4ai-command-r7b-12-2024",
        _file(
            (4096, 14336, 32, 32, 8, 256000, 8192),
            hidden_act="silu",
            logit_scale=0.25,
            rope_theta=50000.0,
            tie_word_embeddings=True,
            sliding_window=4096,
            sliding_window_pattern=4,
            layer_norm_eps=1e-05,
        ),
    ),
    "stablelm": Example(
        "StableLM 3B, 2 1.6B, Zephyr",
        "stablelm-2-1_6b",
        _file(
            (2048, 5632, 24, 32, 32, 100352, 4096),
            hidden_act="silu",
            partial_rotary_factor=0.25,
            rope_theta=10000,
            use_qkv_bias=True,
            layer_norm_eps=1e-05,
        ),
    ),
    "deepseek_v2": Example(
        "DeepSeek-V2, V2-Lite, V2.5, Coder-V2",
        "DeepSeek-V2",
        _file(
            (5120, 12288, 60, 128, 128, 102400, 163840),
            hidden_act="silu",
            rms_norm_eps=1e-06,
            first_k_dense_replace=1,
            kv_lora_rank=512,
            moe_intermediate_size=1536,
            n_group=8,
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            rope_scaling=_DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            rope_theta=10000,
            routed_scaling_factor=16.0,
            topk_group=3,
            topk_method="group_limited_greedy",
            v_head_dim=128,
        ),
    ),
    "deepseek_v3": Example(
        "DeepSeek-V3, V3.1, R1",
        "DeepSeek-V3",
        _file(
            (7168, 18432, 61, 128, 128, 129280, 163840),
            hidden_act="silu",
            rms_norm_eps=1e-06,
            first_k_dense_replace=3,
            kv_lora_rank=512,
            moe_intermediate_size=2048,
            n_group=8,
            n_routed_experts=256,
            n_shared_experts=1,
            norm_topk_prob=True,
            num_experts_per_tok=8,
            num_nextn_predict_layers=1,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            rope_scaling=_DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
            rope_theta=10000,
            routed_scaling_factor=2.5,
            topk_group=4,
            v_head_dim=128,
        ),
    ),
    "mixtral": Example(
        "Mixtral 8x7B, 8x22B",
        "Mixtral-8x7B-v0.1",
        _file(
            (4096, 14336, 32, 32, 8, 32000, 32768),
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            num_experts_per_tok=2,
            num_local_experts=8,
        ),
    ),
    "qwen2_moe": Example(
        "Qwen1.5-MoE, Qwen2-MoE",
        "Qwen1.5-MoE-A2.7B",
        _file(
            (2048, 5632, 24, 16, 16, 151936, 40960),
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            moe_intermediate_size=1408,
            num_experts=60,
            num_experts_per_tok=4,
            shared_expert_intermediate_size=5632,
        ),
    ),
    "qwen3_moe": Example(
        "Qwen3-MoE",
        "Qwen3-30B-A3B",
        _file(
            (2048, 6144, 48, 32, 4, 151936, 40960),
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            head_dim=128,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
    "phimoe": Example(
        "Phi-3.5-MoE",
        "Phi-3.5-MoE-instruct",
        _file(
            (4096, 6400, 32, 32, 8, 32064, 131072),
            attention_bias=True,
            hidden_act="silu",
            lm_head_bias=True,
            num_experts_per_tok=2,
            num_local_experts=16,
            original_max_position_embeddings=4096,
            rms_norm_eps=1e-05,
            rope_scaling={
                "long_factor": [2.0] * 64,
                "long_mscale": 1.243163121016122,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 64,
                "short_mscale": 1.243163121016122,
                "type": "longrope",
            },
            rope_theta=10000.0,
            router_jitter_noise=0.01,
            sliding_window=131072,
        ),
    ),
}
EXAMPLES = {
    model_type: example._replace(values={"model_type": model_type, **example.values})
    for model_type, example in _EXAMPLES.items()
}
