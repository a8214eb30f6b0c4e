"""Command-R, Aya 23: attention and feed-forward in parallel, LayerNorm, scaled logits, interleaved rotary embedding.
https://huggingface.co/CohereForAI/c4ai-command-r-v01."""

from typing import Any

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def cohere(hf: HFConfig, **family: Any) -> DecoderConfig:
    """What Cohere 1 and 2 share."""
    hf.defaults(tie_word_embeddings=True)
    bias = hf.get("attention_bias", False)
    hf.get("model_max_length")
    return common(
        hf,
        block="parallel",
        norm="layer",
        rms_norm_eps=hf.number("layer_norm_eps", 1e-5),
        rope_interleaved=True,
        logit_scale=hf.number("logit_scale", 0.0625),
        qkv_bias=bias,
        o_bias=bias,
        **family,
    )


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.require("use_qk_norm", (False,), False)  # Command-R+ has a LayerNorm for every head
    return cohere(hf, rope=hf.rope(5e5))
