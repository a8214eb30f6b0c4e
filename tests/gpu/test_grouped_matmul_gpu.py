"""The grouped products' kernels on a real card, at the sizes of their cases, and a Mixtral's and a GPT-OSS's step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastft_jax.bench.random_model import random_model
from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.grouped_matmul.cases import CASES
from fastft_jax.trainers.step import LossOptions, gradients

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_reference_on_the_same_numbers(case):
    """Both sum in float32 and round once: half an ulp of bfloat16 apart where the sums' order tips a rounding."""
    args = case.draw(0)
    ours, wanted = (np.asarray(f(*args).astype(jnp.float32), np.float64) for f in (case.run, jax.jit(case.reference)))
    assert np.linalg.norm(ours - wanted) < 3e-3 * np.linalg.norm(wanted)
    assert np.abs(ours - wanted).max() < 2**-7 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "own",
    [{"model_type": "mixtral"}, {"model_type": "gpt_oss", "sliding_window": 100, "num_experts_per_tok": 2}],
    ids=lambda own: own["model_type"],
)
def test_a_step_over_experts_has_the_gradients_of_the_plain_references(own):
    config = own | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "max_position_embeddings": 512,
        "vocab_size": 320,
    }
    model = random_model(config, dtype="float32", max_length=256, r=8)
    definition, trainable, frozen = nnx.split(model.decoder, nnx.Param, ...)
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(trainable)))
    leaves = [jax.random.normal(k, x.shape) * 0.05 for k, x in zip(keys, jax.tree.leaves(trainable), strict=True)]
    trainable = jax.tree.unflatten(jax.tree.structure(trainable), leaves)
    ids = np.random.default_rng(0).integers(0, 320, (1, 2, 256)).astype(np.int32)
    batch = {"input_ids": ids, "labels": np.roll(ids, -1, 2), "segment_ids": np.ones_like(ids)}
    batch["positions"] = np.broadcast_to(np.arange(256, dtype=np.int32), ids.shape)
    step = jax.jit(gradients, static_argnums=(0, 4))
    for policy in ("none", "offload"):
        options = LossOptions(policy, 128, None)
        ours = step(definition, trainable, frozen, batch, options, None)
        with pallas.references():
            wanted = step(definition, trainable, frozen, batch, options, None)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.linalg.norm(a - b) < 2e-3 * np.linalg.norm(b)  # the order of float32 sums, through two layers
