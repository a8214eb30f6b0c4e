"""The bench on a card: what is a dash on a CPU is a number, and kernels are found in the profile."""

import json

import jax
import pytest

from fastft_jax.bench import kernels
from fastft_jax.bench.__main__ import main
from fastft_jax.bench.profile import Speeds
from fastft_jax.trainers.environment import device_peak_flops

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


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


def test_a_step_is_profiled_by_class_against_its_bounds(tmp_path):
    config, out = tmp_path / "config.json", tmp_path / "runs.jsonl"
    config.write_text(json.dumps(SMALL))
    options = [
        "--config",
        str(config),
        "--policy",
        "none",
        "--seq",
        "2048",
        "--r",
        "16",
        "--profile",
        "--out",
        str(out),
    ]
    assert main(options) == 0
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    known = device_peak_flops(row["device"]) is not None
    assert row["peak_memory_bytes"] > 0 and (row["mfu"] is not None) == known
    classes = row["profile"]["classes"]
    assert {"GEMM", "attention", "norm/rope/glu", "dequant", "loss", "optimizer"} <= classes.keys()
    # tiny kernels leave gaps and other tests may share the card: the profiled step may be slower, its work is a step's
    assert 0.3 * row["milliseconds_per_step"] < row["profile"]["step"]
    assert classes["attention"]["launches"] >= 8 and classes["attention"]["launches"] % SMALL["num_hidden_layers"] == 0
    assert classes.get("other", {"milliseconds": 0})["milliseconds"] < 0.3 * row["profile"]["step"]
    assert classes["dequant"]["known"] > 0.9 and classes["dequant"]["bound"] < classes["dequant"]["milliseconds"]
    if known:
        assert classes["GEMM"]["known"] > 0.9 and classes["GEMM"]["bound"] < classes["GEMM"]["milliseconds"]


def test_memory_is_as_fast_as_memory_and_a_case_is_timed_on_the_device():
    copy = kernels.copy_speed()
    assert 1e11 < copy < 2e13
    case = next(case for case in kernels.cases() if case.flops == 0 and case.bytes > 5e7)
    measured = kernels.measure(case, Speeds(copy=copy), calls=5)
    # a call that returned before its kernel ended would be far beyond its bound; other tests may share the card
    assert 0.05 < measured["kernel"]["share_of_bound"] < 2
    assert measured["difference"] < 0.02
