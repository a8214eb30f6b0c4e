"""The step's loss and gradients: what batching, packing and accumulation may not change, and what PEFT computes."""

import warnings

import jax
import numpy as np
import peft
import pytest
import tiny
import tiny_run
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax import FastLanguageModel
from fastft_jax.models import layers, lora
from fastft_jax.trainers.step import LossOptions, gradients

pytestmark = pytest.mark.usefixtures("quick_compilation")
K, ROWS, T = 4, 2, 32
VOCAB = tiny.COMMON["vocab_size"]
compiled_gradients = jax.jit(gradients, static_argnums=(0, 4))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_run.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base):
    return tiny_run.load(base)


@pytest.fixture(scope="module")
def dropping(base):
    return tiny_run.load(base, lora_dropout=0.3)


def loss_and_gradients(model, batch, max_segments=None, key=None):
    """batch [k, B, T]."""
    definition, trainable, frozen = nnx.split(model.decoder, nnx.Param, ...)
    options = LossOptions(policy="none", chunk_size=48, max_segments=max_segments)
    return compiled_gradients(definition, trainable, frozen, batch, options, key)


def random_batch(rng, shares) -> dict[str, np.ndarray]:
    """[k, B, T] of one document a row; in micro-batch i a share shares[i] of the tokens is trained."""
    ids = rng.integers(0, VOCAB, (len(shares), ROWS, T))
    labels = np.where(rng.random(ids.shape) < np.array(shares)[:, None, None], rng.integers(0, VOCAB, ids.shape), -100)
    batch = {
        "input_ids": ids,
        "labels": labels,
        "positions": np.broadcast_to(np.arange(T), ids.shape),
        "segment_ids": np.ones_like(ids),
    }
    return {name: value.astype(np.int32) for name, value in batch.items()}


def assert_same(mine, other, tolerance):
    """Every element within `tolerance`, of the leaf's norm where that is above 1 (these wild models are steep)."""
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(other), strict=True):
        atol = tolerance * max(1.0, float(np.linalg.norm(b)))
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), shares=st.permutations([0.0, 0.05, 0.4, 1.0]), empty=st.booleans()
)  # always one micro-batch without a trained token; with `empty`, none has one
def test_k_micro_batches_equal_one_batch_of_k_times_the_rows(model, seed, shares, empty):
    batch = random_batch(np.random.default_rng(seed), [0.0] * K if empty else shares)
    together = {name: value.reshape(1, K * ROWS, T) for name, value in batch.items()}
    loss, grads = loss_and_gradients(model, batch)
    loss_together, grads_together = loss_and_gradients(model, together)
    # float32 sums in another order; the bound
    np.testing.assert_allclose(loss, loss_together, rtol=1e-6)
    assert_same(grads, grads_together, 1e-6)
    if empty:
        assert loss == 0 and all(not leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["llama-2", "qwen-2-window"])
def test_packed_documents_have_the_loss_and_gradients_of_unpacked_ones(name, tmp_path):
    model = tiny_run.load(tiny_run.save_base(tmp_path, name), target_modules=["k_proj", "down_proj"])
    data = tiny_run.documents([33, 17, 5, 29, 2, 12, 21, 9])
    packed, source = tiny_run.whole(data, packing=True)
    unpacked, _ = tiny_run.whole(data, packing=False)
    assert len(packed["labels"]) < len(unpacked["labels"]) == len(data) and source.max_segments > 2
    assert (packed["labels"] != -100).sum() == (unpacked["labels"] != -100).sum() == data.stats.n_trained
    a = loss_and_gradients(model, {k: v[None] for k, v in packed.items()}, source.max_segments)
    b = loss_and_gradients(model, {k: v[None] for k, v in unpacked.items()})
    assert_same(a, b, 1e-5)  # the bound; the sums inside attention have other lengths


def test_loss_is_the_float64_cross_entropy_of_the_models_logits(model):
    batch = random_batch(np.random.default_rng(5), [0.5, 0.1])
    loss, _ = loss_and_gradients(model, batch)
    logits = np.asarray(model(batch["input_ids"].reshape(-1, T))).astype(np.float64)
    labels = batch["labels"].reshape(-1, T)
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    right = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    expected = (log_sum - right)[labels != -100].mean()
    np.testing.assert_allclose(loss, expected, rtol=2e-6)  # float32 logits and sums


@pytest.mark.parametrize(
    "name, modules",
    [
        ("llama-2", ["embed_tokens", "lm_head"]),
        ("llama-3.2-tied", ["embed_tokens", "lm_head"]),
        ("llama-3.2-tied", ["embed_tokens"]),
        ("llama-3.2-tied", ["lm_head"]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of tied modules: that is what is compared
def test_gradients_with_modules_to_save_equal_pefts(name, modules, tmp_path):
    reference = tiny.make_model(name, num_hidden_layers=2)
    folder = tiny.save(reference, tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, modules_to_save=modules,
        task_type="CAUSAL_LM", base_model_name_or_path=str(folder),
    )  # fmt: skip
    reference = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for parameter_name, parameter in reference.named_parameters():
            if "modules_to_save" in parameter_name:
                parameter.add_(0.05 * torch.randn_like(parameter))  # no longer the base's
    reference.peft_config["default"].base_model_name_or_path = str(folder)
    reference.save_pretrained(tmp_path / "adapter")
    batch = random_batch(np.random.default_rng(2), [0.7, 0.3])

    labels = batch["labels"].reshape(-1, T)
    logits = reference(torch.tensor(batch["input_ids"].reshape(-1, T))).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels.reshape(-1), dtype=torch.long))
    loss.backward()
    theirs = {
        parameter_name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p.grad
        for parameter_name, p in reference.named_parameters()
        if p.requires_grad
    }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", dtype="float32", load_in_4bit=False)
    our_loss, grads = loss_and_gradients(ours, batch)
    definition, _, frozen = nnx.split(ours.decoder, nnx.Param, ...)
    mine = lora.trainable_tensors(nnx.merge(definition, grads, frozen), ours.names)
    np.testing.assert_allclose(our_loss, loss.item(), atol=1e-5)
    assert mine.keys() == theirs.keys() and all(any(m in key for key in mine) for m in modules)
    for key, value in theirs.items():
        np.testing.assert_allclose(mine[key], value.numpy(), atol=1e-4, rtol=0, err_msg=key)


def test_dropout_zeroes_its_share_and_scales_the_rest(model):
    """x goes through A = B = identity with a zero base weight, so the output is the dropped x itself."""
    from fastft_jax.models.layers import Linear
    from fastft_jax.models.residuals import Keep

    p, n = 0.3, 64
    linear = Linear(np.zeros((n, n), np.float32))
    linear.lora_A, linear.lora_B = (
        nnx.LoRAParam(np.eye(n, dtype=np.float32)),
        nnx.LoRAParam(np.eye(n, dtype=np.float32)),
    )
    linear.dropout = p
    x = np.random.default_rng(0).uniform(1, 2, (1, 4096, n)).astype(np.float32)
    out = np.asarray(linear(x, Keep(), jax.random.key(0)))
    dropped = out == 0
    sigma = np.sqrt(p * (1 - p) / x.size)
    assert abs(dropped.mean() - p) < 5 * sigma
    np.testing.assert_allclose(out[~dropped], (x / (1 - p))[~dropped], rtol=1e-6)
    assert abs(out.mean() / x.mean() - 1) < 5 * sigma / (1 - p) * 1.1  # E[dropout(x)] = x; 1.1: x itself varies
    np.testing.assert_array_equal(np.asarray(linear(x, Keep())), x)  # no key, no dropout: evaluation
    # neither the tokens nor the features of a token share their fate
    by_token = dropped[0].mean(1)
    assert by_token.std() == pytest.approx(np.sqrt(p * (1 - p) / n), rel=0.1)


def test_dropout_differs_by_step_by_micro_batch_and_repeats_for_a_key(dropping, model):
    batch = random_batch(np.random.default_rng(1), [0.5, 0.5])
    batch = {name: np.stack([value[0], value[0]]) for name, value in batch.items()}  # two equal micro-batches
    silent = np.full_like(batch["labels"][0], -100)
    first, second = (
        batch | {"labels": np.stack(pair)} for pair in ((batch["labels"][0], silent), (silent, batch["labels"][0]))
    )

    def loss(batch, step):
        key = None if step is None else jax.random.fold_in(jax.random.key(7), step)
        return float(loss_and_gradients(dropping, batch, key=key)[0])

    assert loss(first, 0) == loss(first, 0)
    assert loss(first, 0) != loss(first, 1)
    assert loss(first, 0) != loss(second, 0)
    assert loss(first, None) == loss(second, None) == float(loss_and_gradients(model, first)[0])


def test_dropout_differs_by_layer_and_by_linear(dropping, monkeypatch):
    """The masks are drawn from one key for each linear of each layer, all different."""
    seen = []
    original = layers.drop

    def spy(x, rate, key):
        jax.debug.callback(lambda k: seen.append(tuple(np.asarray(k).ravel())), jax.random.key_data(key))
        return original(x, rate, key)

    monkeypatch.setattr(layers, "drop", spy)
    ids = np.zeros((1, 8), np.int32)
    jax.block_until_ready(dropping.decoder.hidden_states(ids, dropout_key=jax.random.key(3)))
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 2 * len(tiny_run.TARGETS)
