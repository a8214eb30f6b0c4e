"""OLMo 3: OLMo 2 with windows in three layers of four; rope scaling is for the fourth.
https://huggingface.co/allenai/Olmo-3-1025-7B."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.families.olmo2 import OUTPUT_NORMS, olmo2

NAMES = NameTable(modules=OUTPUT_NORMS)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    layers, window = hf.count("num_hidden_layers"), hf.count("sliding_window", 4096)
    sliding = hf.sliding([(i + 1) % 4 != 0 for i in range(layers)])
    full, local = (hf.rope(5e5, layer_type=kind) for kind in ("full_attention", "sliding_attention"))
    return olmo2(
        hf,
        rope=full,
        second_rope=None if local == full else local,
        second_rope_layers=() if local == full else tuple(i for i, slides in enumerate(sliding) if slides),
        layer_windows=tuple(window if slides else None for slides in sliding),
    )
