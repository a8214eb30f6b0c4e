"""Gemma 2: norms around each block, soft-capped logits, local and global layers in turn. arXiv:2408.00118."""

from typing import Any

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.gemma import gemma
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.names import NameTable

SANDWICH = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
NAMES = NameTable(modules=SANDWICH)


def gemma2(hf: HFConfig, every: int, **family: Any) -> DecoderConfig:
    """What Gemma 2 and 3 share; of `every` layers the last attends to everything."""
    layers, window = hf.count("num_hidden_layers"), hf.count("sliding_window", 4096)
    sliding = hf.sliding([(i + 1) % every != 0 for i in range(layers)])
    hf.get("hidden_act")  # published beside hidden_activation, and not used
    return gemma(
        hf,
        block="sandwich",
        activation=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=hf.number("query_pre_attn_scalar", 256) ** -0.5,
        final_softcap=hf.get("final_logit_softcapping"),
        layer_windows=tuple(window if slides else None for slides in sliding),
        **family,
    )


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(
        head_dim=256,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )
    return gemma2(hf, 2, attention_softcap=hf.get("attn_logit_softcapping"))
