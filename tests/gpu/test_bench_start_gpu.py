"""On a card: weights are drawn in their own memory, and the kernels of a whole model pass the check."""

import json
import subprocess
import sys

import jax
import pytest

from fastft_jax.bench.__main__ import main
from fastft_jax.bench.geometries import GEOMETRIES

pytestmark = pytest.mark.gpu

SMALL = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "vocab_size": 8192,
}

SIZE = GEOMETRIES["llama-3.2-1b"]
# In a process of its own, since the peak of a process never goes down.
DRAW = """
import json, sys
import jax
from flax import nnx
from fastft_jax.bench.geometries import GEOMETRIES
from fastft_jax.bench.random_model import random_base
model = random_base(GEOMETRIES["llama-3.2-1b"], max_length=8)
held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.decoder)))
jax.block_until_ready(nnx.state(model.decoder))
print(json.dumps([held, jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]]))
"""


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


def test_drawing_needs_no_memory_but_the_weights_and_one_more_embedding(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process has most of the card already
    done = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, check=True)
    held, peak = json.loads(done.stdout.splitlines()[-1])
    embedding = 2 * SIZE["vocab_size"] * SIZE["hidden_size"]
    assert held > 5e8 and peak < held + embedding + 64e6


@pytest.mark.parametrize("options", [["--policy", "none", "offload"], ["--packed"]], ids=" ".join)
def test_kernels_are_within_the_noise_of_the_dtype(options, tmp_path):
    config, out = tmp_path / "config.json", tmp_path / "checks.jsonl"
    config.write_text(json.dumps(SMALL))
    assert main(["--check", "--config", str(config), "--seq", "512", "--r", "16", "--out", str(out), *options]) == 0
    for line in out.read_text().splitlines():
        found = json.loads(line)["check"]
        assert found["within_noise"] and found["error_ratio"]["max"] != 1  # 1: nothing but references ran
