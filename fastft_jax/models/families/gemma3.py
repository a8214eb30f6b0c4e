"""Gemma 3, the multimodal checkpoints (4B and up): their text decoder; images are not read. arXiv:2503.19786."""

from collections.abc import Mapping
from typing import Any

from fastft_jax.errors import CheckpointError
from fastft_jax.models.families.gemma2 import SANDWICH
from fastft_jax.models.families.gemma3_text import config_from_hf
from fastft_jax.models.families.names import NameTable

__all__ = ["NAMES", "STANDALONE", "config_from_hf", "text_values"]

STANDALONE = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}  # the decoder saved by itself
_VISION = ("vision_tower.", "multi_modal_projector.")
NAMES = NameTable(
    layer_prefix="model.language_model.layers.{}.",
    modules=SANDWICH,
    top={
        "embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    ignored_under=(*_VISION, *(f"model.{name}" for name in _VISION)),
    stored_as=({"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},),
)


def text_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The text decoder's part of config.json."""
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError("config.json has no table 'text_config', which gemma3 models need")
    outer = {key: values[key] for key in ("rope_theta", "rope_scaling") if values.get(key)}
    if outer:  # a caller's own rope_scaling replaces the file's
        text = {key: value for key, value in text.items() if key != "rope_parameters"}
    tied = values.get("tie_word_embeddings")
    return {"tie_word_embeddings": True if tied is None else tied} | text | outer | {"model_type": "gemma3"}
