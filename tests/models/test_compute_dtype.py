"""fp8 products in a whole model: what they change, what they leave, and who may not have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastft_jax import FastLanguageModel
from fastft_jax.errors import ConfigError
from fastft_jax.models import compute_dtype, layers
from fastft_jax.models.compute_dtype import check_compute_dtype, set_compute_dtype
from fastft_jax.models.lora import layer_linears
from fastft_jax.quant.fp8_mlp import fp8_mlp
from fastft_jax.trainers.step import LossOptions, gradients

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(repo):
    """A trained small model with an adapter that acts, in bfloat16."""
    folder = repo / "examples" / "tiny-base"
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=64, dtype="bfloat16", compute_dtype="fp8")
    return FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False, lora_alpha=1)


def computes(model) -> dict[str, str | None]:
    return {path: linear.weight.get_value().compute for path, linear in layer_linears(model.decoder.segments[0][0])}


def loss_and_gradient(model, policy: str) -> tuple[float, np.ndarray]:
    ids = np.random.default_rng(0).integers(5, 1000, (1, 2, 48)).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids, "segment_ids": np.ones_like(ids)}
    batch["positions"] = np.broadcast_to(np.arange(48, dtype=np.int32), ids.shape)
    definition, trainable, frozen = nnx.split(model.decoder, nnx.Param, ...)
    run = jax.jit(gradients, static_argnums=(0, 4))
    loss, gradient = run(
        definition, trainable, frozen, batch, LossOptions(policy=policy, chunk_size=1024, max_segments=1), None
    )
    return float(loss), np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(gradient)])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_loss_and_adapter_gradient_stay_close_to_bfloat16(model, monkeypatch):
    fused = []
    monkeypatch.setattr(layers, "fp8_mlp", lambda *a, **k: (fused.append(a), fp8_mlp(*a, **k))[1])
    assert set(computes(model).values()) == {"fp8"}
    loss, gradient = loss_and_gradient(model, "none")
    assert fused
    for policy in ("selective", "offload"):
        again, recomputed = loss_and_gradient(model, policy)
        assert abs(again / loss - 1) < 1e-3 and cosine(recomputed, gradient) > 0.999  # recomputing quantises alike
    fused.clear()
    set_compute_dtype(model.decoder, None)
    plain_loss, plain = loss_and_gradient(model, "none")
    set_compute_dtype(model.decoder, "fp8")
    assert loss != plain_loss and abs(loss / plain_loss - 1) < 0.02
    assert cosine(gradient, plain) > 0.98 and not fused


@pytest.mark.parametrize("differs", ["a bias", "dropout", "one linear in bfloat16"])
def test_a_feed_forward_layer_that_one_op_does_not_cover_takes_the_other_way(model, monkeypatch, differs):
    mlp, x = model.decoder.segments[0][0].mlp, jnp.ones((1, 3, model.decoder.config.hidden_size), jnp.bfloat16)
    linears, keys = (mlp.gate_proj, mlp.up_proj, mlp.down_proj), (None,) * 3
    assert layers.runs_in_fp8(linears, x, keys)
    if differs == "a bias":
        monkeypatch.setattr(mlp.down_proj, "bias", layers.Frozen(jnp.zeros(3)))
    elif differs == "dropout":
        monkeypatch.setattr(mlp.up_proj, "dropout", 0.1)
        keys = tuple(jax.random.split(jax.random.key(0), 3))
    else:
        set_compute_dtype(model.decoder, "fp8", keep=["mlp.up_proj"])
    fused = layers.runs_in_fp8(linears, x, keys)
    set_compute_dtype(model.decoder, "fp8")
    assert not fused


def test_named_linears_keep_their_dtype(model):
    set_compute_dtype(model.decoder, "fp8", keep=["mlp.down_proj"])
    kept = computes(model)
    set_compute_dtype(model.decoder, "fp8")
    assert kept.pop("mlp.down_proj") is None and set(kept.values()) == {"fp8"}


def test_a_dense_base_or_an_older_gpu_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'int3' is not one of fp8"):
        check_compute_dtype("int3")
    with pytest.raises(ConfigError, match="needs load_in_4bit=True"):
        FastLanguageModel.from_pretrained(tmp_path, load_in_4bit=False, compute_dtype="fp8")
    monkeypatch.setattr(compute_dtype, "current_device", lambda: ("gpu", (8, 6)))
    with pytest.raises(ConfigError, match="8.9 .* this one has 8.6"):
        FastLanguageModel.from_pretrained(tmp_path, compute_dtype="fp8")
    monkeypatch.setattr(compute_dtype, "current_device", lambda: ("gpu", (8, 9)))
    check_compute_dtype("fp8")
    check_compute_dtype(None, load_in_4bit=False)


def test_logits_come_from_the_same_codes(model):
    row = np.arange(5, 37)[None]
    logits = model(row)
    set_compute_dtype(model.decoder, None)
    plain = model(row)
    set_compute_dtype(model.decoder, "fp8")
    assert not jnp.array_equal(logits, plain)
    assert cosine(np.ravel(logits).astype(np.float64), np.ravel(plain).astype(np.float64)) > 0.99
