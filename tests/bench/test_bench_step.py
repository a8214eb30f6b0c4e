"""The bench times the very step that training runs, on weights made on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastft_jax.bench.geometries import GEOMETRIES
from fastft_jax.bench.measure import Bench, Workload, attention_flops
from fastft_jax.bench.random_model import random_model, random_weights
from fastft_jax.errors import ConfigError
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.quant.nf4 import NF4Array, dequantize
from fastft_jax.trainers.flops import useful_flops
from fastft_jax.trainers.loop import Loop
from fastft_jax.trainers.sft_config import SFTConfig

TINY = {  # every linear is 64 x 64: drawing and quantising it compiles once
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": 160,
}


def model():
    return random_model(TINY, dtype="float32", max_length=64, r=4)


class Silent:
    """What a Loop reports to; keeps the losses."""

    def __init__(self):
        self.losses = []

    def say(self, text):
        pass

    def advance(self, step):
        pass

    def step(self, step, *, loss, **_):
        self.losses.append(loss)


@pytest.mark.parametrize("packed", [False, True])
def test_losses_and_memory_are_those_of_the_training_loop(packed, tmp_path, xla_cache):
    work = Workload("none", 2, 64, packed)
    bench = Bench(model(), optim="adamw")
    first, _ = bench.run(work, steps=2, warmup=1)
    again, _ = bench.run(work, steps=2, warmup=1)
    assert again["losses"] == first["losses"]  # every run starts from the same adapter

    trained = model()
    trained.remat_policy = "none"
    source = work.source(TINY["vocab_size"], 3)
    args = SFTConfig(output_dir=str(tmp_path), max_steps=3, save_strategy="no", packing=packed, optim="adamw")
    loop, reporter = Loop(trained, args, source, None, {}), Silent()
    loop.run(0, reporter)
    assert first["losses"] == [round(loss, 4) for loss in reporter.losses]
    assert first["program_bytes"] == loop.program_bytes()


def test_random_weights_are_quantised_a_layer_at_a_time_and_differ():
    load = random_weights(jnp.float32)
    stacked = load("mlp.up_proj.weight", (64, 64), (0, 1))
    assert isinstance(stacked, NF4Array) and stacked.codes.shape == (2, 64, 32) and stacked.shape == (64, 64)
    layers = [np.asarray(dequantize(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), jnp.float32)) for i in range(2)]
    for layer in layers:
        assert abs(layer.std() - 0.02) < 0.002 and abs(layer.mean()) < 0.002
    assert not np.array_equal(layers[0], layers[1])
    gate = load("mlp.gate_proj.weight", (64, 64), (0, 1))
    assert not np.array_equal(gate.codes, stacked.codes)
    assert np.array_equal(load("mlp.up_proj.weight", (64, 64), (0, 1)).codes, stacked.codes)
    assert (np.asarray(load("input_layernorm.weight", (64,), (0, 1))) == 1).all()
    embedding = load("embed_tokens.weight", (160, 64), None)
    assert embedding.shape == (160, 64) and embedding.dtype == jnp.float32


def test_the_adapter_is_on_every_linear_and_leaves_the_device_with_the_bench():
    made = model()
    leaves = jax.tree.leaves(nnx.state(made.decoder, nnx.Param))
    assert len(leaves) == 14 and made.peft_config["r"] == 4
    bench = Bench(made, optim="adamw")
    assert all(leaf.is_deleted() for leaf in leaves)
    assert bench.trainable_count == 2 * 7 * 4 * (64 + 64)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="--dtype"):
        random_model(TINY, dtype="int8", max_length=8, r=4)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_are_supported_models_of_their_size(name):
    config, _ = config_from_hf(GEOMETRIES[name])
    c = config
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    layers = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    total = layers + c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    billions = {"llama-3.1-8b": 8.03, "llama-3.2-1b": 1.236, "llama-3.1-70b": 70.55, "mistral-7b": 7.24}
    billions |= {"qwen2.5-7b": 7.62, "qwen3-8b": 8.19}
    assert total / 1e9 == pytest.approx(billions[name], rel=1e-3)


def test_attention_flops_are_the_part_of_the_model_flops_that_grows_with_the_length():
    config, _ = config_from_hf(GEOMETRIES["mistral-7b"])
    batch = Workload("none", 1, 6000).source(100, 1).batch(0, 0)
    visible = sum(min(t + 1, 4096) for t in range(6000))
    assert attention_flops(config, batch) == pytest.approx(14 * 4096 * visible * 32)
    assert attention_flops(config, batch) < useful_flops(config, batch, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_every_position_holds_a_token_and_every_label_but_a_documents_first_is_trained(packed):
    source = Workload("none", 3, 256, packed).source(1000, 4)
    assert source.width == 256 and source.steps_per_epoch >= 4
    batch = source.batch(0, 0)
    held = batch["segment_ids"] > 0
    assert source.fill > 0.9 if packed else held.all()
    documents = sum(len(np.unique(row[row > 0])) for row in batch["segment_ids"])
    assert (batch["labels"] != -100).sum() == held.sum() - documents
    assert (documents > 3) == packed
