"""Gemma 3, text: Gemma 2 with q/k norms instead of the attention softcap, and a rope base for local layers.
arXiv:2503.19786."""

import dataclasses

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.gemma2 import SANDWICH, gemma2
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.names import NameTable

NAMES = NameTable(modules=SANDWICH)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    # the published files leave out what is transformers' default
    hf.defaults(
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
    )
    every = hf.count("sliding_window_pattern", hf.count("_sliding_window_pattern", 6))
    config = gemma2(
        hf,
        every,
        qk_norm="head",
        rope=hf.rope(1e6, layer_type="full_attention"),
        second_rope=hf.rope(1e4, layer_type="sliding_attention", theta_key="rope_local_base_freq"),
    )
    local = tuple(i for i, window in enumerate(config.layer_windows) if window is not None)
    return dataclasses.replace(config, second_rope_layers=local)
