"""Phi-1.5, 2: attention and a plain feed-forward layer in parallel, LayerNorm, biases everywhere. arXiv:2309.05463."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable(
    modules={"self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
    top={
        "embed_tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.final_layernorm.weight",
        "norm.bias": "model.final_layernorm.bias",
        "lm_head.weight": "lm_head.weight",
        "lm_head.bias": "lm_head.bias",
    },
)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.require("qk_layernorm", (False,), False)
    hf.require("tie_word_embeddings", (False,), False)
    return common(
        hf,
        block="parallel",
        norm="layer",
        norm_bias=True,
        rms_norm_eps=hf.number("layer_norm_eps", 1e-5),
        rope=hf.rope(partial=0.5),
        activation=hf.activation("hidden_act", "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
    )
