"""Merged checkpoints: transformers computes from the folder what the live model computes; faults leave nothing."""

import json
import os
import tracemalloc
import warnings

import jax
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft_jax import FastLanguageModel
from fastft_jax.convert import atomic, merged, save_merged
from fastft_jax.convert.read_back import compare, folder_logits
from fastft_jax.convert.safetensors import Checkpoint, write_sharded
from fastft_jax.errors import CheckpointError, ConfigError

TOLERANCE = 1e-4  # float32 on both sides; the bound of every parity test
IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 20))
pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is what these tests' time goes into."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer in these folders
        return FastLanguageModel.from_pretrained(folder, max_seq_length=64, **{"dtype": "float32"} | options)[0]


def adapt(model, **options):
    return FastLanguageModel.get_peft_model(model, r=4, lora_alpha=6, init_lora_weights=False, **options)


def transformers_logits(folder, ids=IDS):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy(), model


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_of(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names}


FAMILIES = {  # the names and forms that differ: fused projections, 1 + w, biases, other names, tied heads
    "llama-3.2-tied": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
    "llama-biases": {"bias": "lora_only", "layers_to_transform": [1], "use_rslora": True},
    "gemma-2": {"target_modules": "all-linear"},
    "phi-4-mini": {"target_modules": ["qkv_proj", "gate_up_proj"], "modules_to_save": ["embed_tokens"]},
    "phi-2": {},
    "cohere": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_live_models_logits(name, tmp_path):
    """An NF4 base merged in float32 is the very function that was trained, so float32 noise is all that is allowed."""
    base = tiny.save(tiny.make_model(name, num_hidden_layers=2), tmp_path / "base")
    before = snapshot(base)
    model = adapt(load(base), **FAMILIES[name])
    for module in ("embed_tokens", "lm_head"):  # as training would leave them: no longer what the base has
        if module in (model.peft_config["modules_to_save"] or ()):
            weight = getattr(model.decoder, module).weight
            weight.set_value(weight.get_value() * 1.5)
    written = model.save_pretrained_merged(tmp_path / "merged", dtype="float32", max_shard_size="100KB")
    assert len(written.files) > 2 and written.difference.mean < 1e-4
    expected, theirs = transformers_logits(tmp_path / "merged")
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=TOLERANCE, rtol=0)
    names = set(tensors_of(tmp_path / "merged"))
    untied = bool(model.peft_config["modules_to_save"])
    assert ("lm_head.weight" in names) == (untied or not theirs.config.tie_word_embeddings)
    values, old = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "merged", base))
    assert {k for k in old if values.get(k) != old[k]} <= ({"tie_word_embeddings"} if untied else set())
    assert (tmp_path / "merged" / "generation_config.json").read_bytes() == before["generation_config.json"]
    assert snapshot(base) == before
