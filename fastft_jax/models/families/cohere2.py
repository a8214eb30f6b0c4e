"""Command-R7B, Command-A: Cohere with windows in three layers of four, and no rotary embedding in the fourth.
https://huggingface.co/CohereForAI/c4ai-command-r7b-12-2024."""

from fastft_jax.models.config import DecoderConfig, RopeConfig
from fastft_jax.models.families.cohere import cohere
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()
# what the published files say, and what transformers computes whatever they say
PUBLISHED = {
    "layer_switch": 4,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    for key, value in PUBLISHED.items():
        hf.require(key, (value,), value)
    layers, window = hf.count("num_hidden_layers"), hf.count("sliding_window", 4096)
    every = hf.count("sliding_window_pattern", 4)
    sliding = hf.sliding([(i + 1) % every != 0 for i in range(layers)])
    return cohere(
        hf,
        rope=hf.rope(1e4),
        second_rope=RopeConfig(rope_type="none"),
        second_rope_layers=tuple(i for i, slides in enumerate(sliding) if not slides),
        layer_windows=tuple(window if slides else None for slides in sliding),
    )
