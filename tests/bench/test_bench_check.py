"""`--check` finds kernels that compute what their references do, and says so of those that do not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bench_step import TINY

from fastft_jax.bench import check
from fastft_jax.bench.__main__ import main
from fastft_jax.bench.measure import Workload
from fastft_jax.bench.random_model import random_model
from fastft_jax.errors import ConfigError
from fastft_jax.pallas_kernels import attention as attention_op
from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.attention import attention
from fastft_jax.pallas_kernels.rms_norm import select_implementation

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels as on a GPU, interpreted; the names of those that ran."""
    names, call = [], pallas.call

    def note(*args, name, **options):
        names.append(name)
        return call(*args, name=name, **options | {"interpret": True})

    monkeypatch.setattr(pallas, "call", note)
    monkeypatch.setattr(pallas, "on_gpu", lambda: not pallas.only_references())
    return names


def test_kernels_are_compared_with_references_and_are_within_the_noise(interpreted, tmp_path, capsys):
    path, out = tmp_path / "config.json", tmp_path / "checks.jsonl"
    path.write_text(json.dumps(TINY))
    options = ["--config", str(path), "--layers", "1", "--seq", "96", "--r", "4", "--out", str(out)]
    assert main(["--check", *options]) == 0
    kinds = ("rms_norm", "rope_qkv", "silu_glu", "nf4_dequantize", "cross_entropy")
    assert all(any(kind in name for name in interpreted) for kind in kinds)
    row = json.loads(out.read_text())
    assert (row["policy"], row["batch"], row["seq"], row["layers"]) == ("none", 1, 96, 1)
    found = row["check"]
    assert found["matrices"] == 14 and found["within_noise"]
    assert 0 < found["kernels"]["error_median"] < 0.05 and found["kernels"]["cosine_min"] > 0.99
    assert found["error_ratio"]["median"] == pytest.approx(1, abs=0.5) and found["error_ratio"]["max"] != 1
    assert max(found["relative_loss_difference"].values()) < 1e-3
    printed = capsys.readouterr().out
    assert "gradients of 14 LoRA matrices" in printed and "\n  within the noise" in printed


def test_float32_has_nothing_to_be_compared_with():
    with pytest.raises(ConfigError, match="--dtype"):
        check.check(random_model(TINY, r=4, dtype="float32", max_length=8).decoder, Workload("none", 1, 8))


def distances(error):
    return check.Distances(np.array(error), np.full(len(error), 0.999))


def test_float32_is_not_fp8_and_leaves_the_model_as_it_is():
    made = random_model(TINY, r=4, compute_dtype="fp8", max_length=8).decoder
    exact = check.in_float32(made)
    weights = [d.segments[0][0].mlp.up_proj.weight.get_value() for d in (made, exact)]
    assert [w.compute for w in weights] == ["fp8", None] and weights[0].codes is weights[1].codes
    assert (made.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    "kernels, loss, within",
    [
        (distances([0.01, 0.035]), 5.0, True),
        (distances([0.01, 0.041]), 5.0, False),  # more than twice as far off as the reference
        (distances([0.01, np.nan]), 5.0, False),
        (distances([0.01, 0.021]), np.nan, False),
    ],
)
def test_one_matrix_that_is_off_is_named_and_fails_the_check(kernels, loss, within):
    losses = {"kernels": loss, "references": 5.01, "float32": 5.0}
    found = check.judge(losses, {"kernels": kernels, "references": distances([0.01, 0.02])}, ["first", "second"])
    assert found["within_noise"] is within
    assert found["error_ratio"]["worst"] == "second"
    assert ("NOT within" in check.lines(found)[-1]) is not within


def test_distances_are_those_of_float64():
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(3, 5, 7))
    got = wanted + 0.1 * rng.normal(size=wanted.shape)
    found = check.distances([jnp.asarray(got)], [jnp.asarray(wanted)])
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert found.error[i] == pytest.approx(np.linalg.norm(g - w) / np.linalg.norm(w), rel=1e-5)
        assert found.cosine[i] == pytest.approx((g * w).sum() / np.linalg.norm(g) / np.linalg.norm(w), rel=1e-5)
    assert check.matrix_names({"a": jnp.zeros((2, 3, 4))}) == ["a layer 0", "a layer 1"]


def test_references_are_what_every_op_picks_while_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert pallas.on_gpu() and select_implementation(64, False, None) == "triton"
    with pallas.references():
        assert not pallas.on_gpu() and select_implementation(64, False, None) == "xla"
        monkeypatch.setattr(attention_op, "current_device", lambda: ("gpu", (9, 0)))
        q = jax.ShapeDtypeStruct((1, 8, 4, 64), jnp.bfloat16)
        text = str(jax.make_jaxpr(lambda q, k, v: attention(q, k, v, scale=1.0))(q, q, q))
        assert "dot_general" in text and "cudnn" not in text and "pallas_call" not in text
    assert pallas.on_gpu()
