"""A tiny checkpoint of every family of the registry, and transformers' model of it where there is a class for it."""

import json
from functools import partial
from pathlib import Path

import gguf_tiny
import numpy as np
import tiny
import torch
import transformers

from fastft_jax.convert.hf import tensor_requests
from fastft_jax.convert.safetensors import write_sharded
from fastft_jax.models.families.examples import EXAMPLES
from fastft_jax.models.families.registry import config_from_hf

TINY_VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
# llama.cpp's graphs have experts in every layer, as the releases do, and no window
AS_RELEASED = {
    "mixtral": dict(sliding_window=None),
    "qwen-2-moe": dict(mlp_only_layers=[]),
    "qwen-3-moe": dict(decoder_sparse_step=1),
    "gpt-oss": dict(num_hidden_layers=2),  # a layer with a window, one without
    "deepseek-v2": gguf_tiny.DEEPSEEK | dict(topk_method="greedy"),  # V2-Lite
    "deepseek-v3": gguf_tiny.DEEPSEEK,
}
TEXT_OF = {"gemma3": "gemma3_text"}  # multimodal families: the one their text decoder is


def in_transformers(family: str) -> bool:
    return family in transformers.CONFIG_MAPPING


def tiny_name(family: str) -> str | None:
    """The tiny model that stands for a family: one that llama.cpp computes, where there is one."""
    of = TEXT_OF.get(family, family)
    names = [name for name, (model_type, _) in (tiny.TINY | tiny.EXPERTS).items() if model_type == of]
    return next((name for name in names if name in gguf_tiny.FAMILIES), names[0] if names else None)


def write_checkpoint(family: str, tokenizer, folder: Path):
    """Writes it with the tokenizer; returns transformers' model, None where transformers has no class for it."""
    name = tiny_name(family)
    if name is None or not in_transformers(family):
        _write_random(family, folder)
        tokenizer.save_pretrained(folder)
        if not in_transformers(family):
            return None
        options = {"attn_implementation": "eager", "dtype": torch.float32}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model = gguf_tiny.make_family(name, **AS_RELEASED.get(name, {}))
    if family in TEXT_OF:
        model = _multimodal(family, model)
    gguf_tiny.save_folder(model, tokenizer, folder)
    return model


def _multimodal(family: str, text):
    """A model of the family whose text decoder has the weights of `text`, beside a random vision tower."""
    config = transformers.AutoConfig.for_model(
        family, text_config=text.config.to_dict(), vision_config=TINY_VISION, mm_tokens_per_image=4
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    return model


def _write_random(family: str, folder: Path) -> None:
    """The family's example, shrunk: what our own name table calls for, in random numbers."""
    sizes = {"vocab_size": gguf_tiny.VOCABULARY, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
    values = {"model_type": family} | EXAMPLES[family].values | tiny.COMMON | sizes
    if "head_dim" in values:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    config, names = config_from_hf(values)
    requests = list(tensor_requests(config))
    shapes = {name: (np.dtype(np.float32), r.tensor_shape) for r in requests for name in r.hf_names(names)}
    rng = np.random.default_rng(0)
    folder.mkdir()
    write_sharded(folder, shapes, partial(_random, rng, shapes), "5GB", durable=False)
    (folder / "config.json").write_text(json.dumps(values))


def _random(rng, shapes, name: str) -> np.ndarray:
    shape = shapes[name][1]
    return rng.uniform(0.5, 1.5, shape).astype("f") if "norm" in name else rng.normal(0, 0.15, shape).astype("f")
