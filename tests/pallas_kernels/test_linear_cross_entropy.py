"""The chunked head loss against the textbook formula in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.pallas_kernels.linear_cross_entropy import IGNORE_INDEX, default_chunk_size, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("quick_compilation")
VOCAB, WIDTH = 53, 12  # neither a multiple of anything that a GPU or a chunk likes


def oracle(hidden, weight, labels):
    """(loss, correct, d_hidden, d_weight) of the summed loss, all logits at once, float64."""
    hidden, weight = (np.asarray(x, np.float64) for x in (hidden, weight))
    z = hidden @ weight.T
    log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    trained = np.flatnonzero(labels != IGNORE_INDEX)
    dz = np.zeros_like(z)
    dz[trained] = np.exp(log_p[trained])
    dz[trained, labels[trained]] -= 1
    loss = -np.sum(log_p[trained, labels[trained]])
    return loss, np.sum(np.argmax(z, axis=1)[trained] == labels[trained]), dz @ weight, dz.T @ hidden


def random_case(seed, tokens, vocab=VOCAB, width=WIDTH, ignored=0.3):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((tokens, width)).astype(np.float32)
    weight = rng.standard_normal((vocab, width)).astype(np.float32)
    labels = rng.integers(0, vocab, tokens).astype(np.int32)
    labels[rng.random(tokens) < ignored] = IGNORE_INDEX
    return hidden, weight, labels


@functools.cache
def compiled(chunk_size, train_weight, with_accuracy):
    """(loss, correct, gradients of `scale * loss`) as a training step asks for them."""

    @jax.jit
    def run(hidden, weight, labels, scale):
        def loss(hidden, weight):
            total, correct = linear_cross_entropy(
                hidden,
                weight,
                labels,
                chunk_size=chunk_size,
                train_weight=train_weight,
                with_accuracy=with_accuracy,
            )
            return total * scale, (total, correct)

        (_, (total, correct)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)
        return total, correct, *grads

    return run


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.sampled_from([1, 7, 16]),
    chunk_size=st.sampled_from([4, 16, 64]),  # with a tail of padding, exact, and larger than the whole
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    scale=st.sampled_from([1.0, -0.125]),
    seed=st.integers(0, 99),
)
def test_loss_gradients_and_accuracy_equal_the_formula_in_float64(tokens, chunk_size, ignored, scale, seed):
    hidden, weight, labels = random_case(seed, tokens, ignored=ignored)
    ours = compiled(chunk_size, True, True)(hidden, weight, labels, scale)
    loss, correct, dh, dw = oracle(hidden, weight, labels)
    # fp32 sums of at most 16 losses of at most about 30.
    np.testing.assert_allclose(ours[0], loss, rtol=1e-5, atol=1e-5)
    assert ours[1] == correct and ours[1].dtype == jnp.int32
    np.testing.assert_allclose(ours[2], scale * dh, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[3], scale * dw, rtol=1e-5, atol=1e-5)


def test_a_chunk_without_any_trained_token_adds_nothing():
    hidden, weight, labels = random_case(1, 12)
    labels[4:8] = IGNORE_INDEX
    ours = compiled(4, True, True)(hidden, weight, labels, 1.0)
    for a, b in zip(ours, oracle(hidden, weight, labels), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(ours[2])[4:8])


def test_a_frozen_weight_gets_no_gradient_and_no_work():
    hidden, weight, labels = random_case(2, 12)

    def loss(hidden, weight, train_weight):
        return linear_cross_entropy(hidden, weight, labels, chunk_size=4, train_weight=train_weight)[0]

    frozen = jax.grad(functools.partial(loss, train_weight=False), (0, 1))
    dh, dw = frozen(hidden, weight)
    np.testing.assert_allclose(dh, oracle(hidden, weight, labels)[2], rtol=1e-5, atol=1e-5)
    assert not np.any(dw)
    # Logits and dh; with a trained weight one more.
    assert str(jax.make_jaxpr(frozen)(hidden, weight)).count("dot_general[") == 2
    trained = jax.grad(functools.partial(loss, train_weight=True), (0, 1))
    assert str(jax.make_jaxpr(trained)(hidden, weight)).count("dot_general[") == 3


def test_evaluation_computes_only_the_logits():
    hidden, weight, labels = random_case(3, 12)
    f = functools.partial(linear_cross_entropy, chunk_size=4, train_weight=True, with_accuracy=True)
    assert str(jax.make_jaxpr(f)(hidden, weight, labels)).count("dot_general[") == 1
    loss, correct = f(hidden, weight, labels)
    np.testing.assert_allclose(loss, oracle(hidden, weight, labels)[0], rtol=1e-5)
    assert correct == oracle(hidden, weight, labels)[1]


def test_accuracy_is_counted_only_when_asked():
    hidden, weight, labels = random_case(4, 16, ignored=0.0)
    labels[:] = np.argmax(hidden @ weight.T, axis=1)
    assert linear_cross_entropy(hidden, weight, labels, chunk_size=8)[1] == 0
    labels[:3] = IGNORE_INDEX
    assert linear_cross_entropy(hidden, weight, labels, chunk_size=8, with_accuracy=True)[1] == 13


def test_bfloat16_inputs_lose_only_the_rounding_of_the_logits_gradient():
    hidden, weight, labels = random_case(5, 48, vocab=301, width=32)
    hidden, weight = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, weight))
    loss, _, dh, dw = compiled(16, True, False)(hidden, weight, labels, 1.0)
    exact = oracle(hidden, weight, labels)
    assert (loss.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(loss, exact[0], rtol=1e-5)  # the logits are not rounded to bf16
    for ours, theirs in ((dh, exact[2]), (dw, exact[3])):
        # dz and the result are rounded to bf16, 2**-9 relative each.
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) < 5e-3 * np.linalg.norm(theirs)


def test_a_float32_weight_with_bfloat16_states_gets_a_float32_gradient():
    hidden, weight, labels = random_case(6, 16)
    _, _, dh, dw = compiled(8, True, False)(jnp.asarray(hidden, jnp.bfloat16), weight, labels, 0.5)
    assert (dh.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    exact = 0.5 * oracle(hidden, weight, labels)[3]
    # hidden, weight and dz are all rounded to bf16, which also moves the probabilities: logits have deviation 3.5.
    assert np.linalg.norm(dw - exact) < 2e-2 * np.linalg.norm(exact)


def test_large_logits_do_not_overflow():
    hidden, weight, labels = random_case(7, 8)
    ours = compiled(4, True, False)(hidden * 300, weight, labels, 1.0)
    exact = oracle(hidden * 300, weight, labels)
    np.testing.assert_allclose(ours[0], exact[0], rtol=1e-5)
    assert all(np.all(np.isfinite(x)) for x in ours)


@pytest.mark.parametrize("label", [VOCAB, VOCAB + 5, -1, -99])
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(label):
    hidden, weight, labels = random_case(8, 6)
    labels[2] = label
    assert np.isnan(linear_cross_entropy(hidden, weight, labels, chunk_size=4)[0])


@pytest.mark.parametrize("train_weight", [False, True])
def test_memory_is_a_chunks_logits_and_not_all_of_them(train_weight):
    tokens, vocab, width, chunk = 4096, 8192, 64, 256
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    temp = compiled(chunk, train_weight, True).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    logits = chunk * vocab * 4
    # Logits, their exponentials and their gradient at most, and copies of hidden and of the weight's gradient; all
    # logits at once are 16 chunks.
    assert temp < 4 * logits + 2 * tokens * width * 4 + 2 * vocab * width * 4


def test_default_chunk_is_a_power_of_two_whose_logits_fit():
    assert default_chunk_size(128256) == 1024
    assert default_chunk_size(32000) == 4096
    assert default_chunk_size(128256, 1 << 20) == 128
    for vocab in (1000, 50257, 151936, 262144):
        chunk = default_chunk_size(vocab)
        assert chunk & (chunk - 1) == 0 and 4 * chunk * vocab <= 1 << 29 < 8 * chunk * vocab


def test_wrong_arguments_are_named():
    hidden, weight, labels = random_case(9, 6)
    for args, kwargs, words in [
        ((hidden, weight[:, 1:], labels), dict(chunk_size=4), "do not fit"),
        ((hidden, weight, labels[1:]), dict(chunk_size=4), "labels"),
        ((hidden, weight, labels.astype(np.float32)), dict(chunk_size=4), "labels"),
        ((hidden, weight, labels), dict(chunk_size=0), "chunk_size"),
        ((hidden, weight, labels), dict(chunk_size=4, implementation="mosaic"), "implementation"),
    ]:
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(*args, **kwargs)
