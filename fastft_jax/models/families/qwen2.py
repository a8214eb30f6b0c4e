"""Qwen1.5, Qwen2, Qwen2.5: biases on q, k and v; a window on the upper layers if asked. arXiv:2407.10671."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def windows(hf: HFConfig) -> tuple[int | None, ...]:
    """`layer_types` where the file has them, else layers from `max_window_layers` on slide."""
    layers, window = hf.count("num_hidden_layers"), hf.count("sliding_window", 4096)  # transformers' default
    first = hf.get("max_window_layers", 28)
    sliding = hf.sliding([i >= first for i in range(layers)])
    if not hf.get("use_sliding_window", False):
        return (None,) * layers
    return tuple(window if slides else None for slides in sliding)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    return common(hf, qkv_bias=True, layer_windows=windows(hf))
