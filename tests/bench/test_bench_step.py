"""The bench times the very step that training runs, on weights made on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastft_jax.bench.geometries import GEOMETRIES
from fastft_jax.bench.measure import Bench, Workload, attention_flops
from fastft_jax.bench.random_model import random_model, random_weights
from fastft_jax.bench.random_values import SCALE, normal
from fastft_jax.errors import ConfigError
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.pallas_kernels.nf4 import NF4_CODE, dynamic_map
from fastft_jax.quant.nf4 import NF4Array, dequantize
from fastft_jax.trainers.flops import useful_flops
from fastft_jax.trainers.loop import Loop
from fastft_jax.trainers.sft_config import SFTConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
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


def test_random_weights_are_nf4_and_differ_from_layer_to_layer_and_place_to_place():
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
    assert abs(float(embedding.std()) - 0.02) < 0.001
    bias = load("self_attn.q_proj.bias", (64,), (0, 1))
    assert bias.shape == (2, 64) and not np.array_equal(bias[0], bias[1])


def test_drawn_nf4_looks_as_quantised_normals_do():
    blocks = np.random.default_rng(0).normal(0, 0.02, (16384, 64))
    absmax = np.abs(blocks).max(axis=1)
    codes = np.searchsorted((NF4_CODE[:-1] + NF4_CODE[1:]) / 2, blocks / absmax[:, None])
    drawn = random_weights(jnp.float32)("mlp.up_proj.weight", (256, 4096), (0,))
    drawn = jax.tree.map(lambda leaf: np.asarray(leaf[0]), drawn)
    assert (drawn.codes.shape, drawn.absmax.shape, drawn.absmax_scale.shape) == ((16384, 32), (16384,), (64,))
    drawn_codes = np.concatenate([drawn.codes >> 4, drawn.codes & 15], axis=1)
    histograms = [np.bincount(x.ravel(), minlength=16) / x.size for x in (drawn_codes, codes)]
    np.testing.assert_allclose(*histograms, rtol=0.05)
    drawn_absmax = dynamic_map()[drawn.absmax] * drawn.absmax_scale[0] + drawn.absmax_offset
    quantiles = [np.percentile(x, [5, 25, 50, 75, 95]) for x in (drawn_absmax, absmax)]
    np.testing.assert_allclose(*quantiles, rtol=0.05)
    decoded = NF4_CODE[drawn_codes] * drawn_absmax[:, None]
    assert decoded.std() == pytest.approx(0.02, rel=0.01) and abs(decoded.mean()) < 1e-4
    assert abs(np.corrcoef(decoded[:-1].ravel(), decoded[1:].ravel())[0, 1]) < 0.01


def test_drawn_normals_are_normal():
    x = np.asarray(normal(np.array([1, 2], np.uint32), (2, 1 << 17), jnp.float32)).astype(np.float64) / SCALE
    assert (
        np.isfinite(x).all()
        and abs(np.corrcoef(*x)[0, 1]) < 0.01
        and abs(np.corrcoef(x[0, 1:], x[0, :-1])[0, 1]) < 0.01
    )
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        assert np.mean(x**power) == pytest.approx(moment, abs=0.01 * (power + 1) * max(1, moment))


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
    mlps = 1 if c.experts is None else c.experts.num_experts
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    layers = c.num_hidden_layers * (attention + mlps * 3 * c.hidden_size * c.intermediate_size)
    total = layers + c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    billions = {"llama-3.1-8b": 8.03, "llama-3.2-1b": 1.236, "llama-3.1-70b": 70.55, "mistral-7b": 7.24}
    billions |= {"qwen2.5-7b": 7.62, "qwen3-8b": 8.19, "mixtral-8x7b": 46.70, "gpt-oss-20b": 20.91}
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
