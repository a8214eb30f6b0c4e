"""SmolLM3: Llama with no rotary embedding in every fourth layer. https://huggingface.co/HuggingFaceTB/SmolLM3-3B."""

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig, RopeConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(tie_word_embeddings=True)
    layers, bias = hf.count("num_hidden_layers"), hf.get("attention_bias", False)
    every = hf.count("no_rope_layer_interval", 4)
    rotates = hf.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]  # 1 where there IS rope
    if len(rotates) != layers:
        raise CheckpointError(f"config.json: no_rope_layers has {len(rotates)} entries for {layers} layers")
    sliding = hf.sliding([not rotated for rotated in rotates])
    window = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    hf.get("max_window_layers")
    return common(
        hf,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        rope=hf.rope(2e6),
        second_rope=None if all(rotates) else RopeConfig(rope_type="none"),
        second_rope_layers=tuple(i for i, rotated in enumerate(rotates) if not rotated),
        layer_windows=tuple(window if slides else None for slides in sliding),
    )
