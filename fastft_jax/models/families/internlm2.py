"""InternLM2, 2.5: Llama with one linear for q, k and v, by key heads, and Meta's own names. arXiv:2403.17297."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable(
    modules={
        "self_attn.qkv_proj": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    top={
        "embed_tokens.weight": "model.tok_embeddings.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "output.weight",
    },
)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.get("attn_implementation")  # published
    bias = hf.get("bias", True)  # the publisher's default; released files say false
    return common(hf, grouped_qkv=True, qkv_bias=bias, o_bias=bias, rope=hf.rope(1e4))
