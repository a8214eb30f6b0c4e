"""Softcap, scale, smoothing and z-loss against torch in float64; the kernel against the reference; skipped tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fastft_jax.pallas_kernels.linear_cross_entropy import chunks, linear_cross_entropy, reference, triton
from fastft_jax.pallas_kernels.linear_cross_entropy.reference import Terms

pytestmark = pytest.mark.usefixtures("quick_compilation")
VOCAB, WIDTH, IGNORED = 53, 12, -100
TERMS = [
    Terms(),
    Terms(softcap=5.0),
    Terms(logit_scale=0.3, ignore_index=7),
    Terms(softcap=4.0, logit_scale=2.0, label_smoothing=0.2, z_loss=0.01),
]


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Four tiles a row, the last one ragged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "TILE", 16)
        yield


def random_case(seed, tokens, ignore_index=IGNORED, ignored=0.4):
    rng = np.random.default_rng(seed)
    hidden, weight = (rng.standard_normal((n, WIDTH)).astype(np.float32) for n in (tokens, VOCAB))
    labels = rng.integers(0, VOCAB, tokens).astype(np.int32)
    labels[rng.random(tokens) < ignored] = ignore_index
    return hidden, weight, labels


def in_torch(hidden, weight, labels, terms: Terms):
    """(loss, d_hidden, d_weight), float64."""
    h, w = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (hidden, weight))
    y = torch.tensor(labels, dtype=torch.long)
    z = terms.logit_scale * h @ w.T
    if terms.softcap is not None:
        z = terms.softcap * torch.tanh(z / terms.softcap)
    loss = torch.nn.functional.cross_entropy(
        z, y, reduction="sum", label_smoothing=terms.label_smoothing, ignore_index=terms.ignore_index
    )
    loss = loss + terms.z_loss * torch.sum(torch.logsumexp(z, 1)[y != terms.ignore_index] ** 2)
    loss.backward()
    return loss.item(), h.grad.numpy(), w.grad.numpy()


@functools.cache
def compiled(implementation, terms: Terms):
    def loss(hidden, weight, labels):
        kwargs = dict(terms._asdict(), chunk_size=8, train_weight=True, implementation=implementation)
        return linear_cross_entropy(hidden, weight, labels, **kwargs)[0]

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def assert_equals_torch(implementation, terms, scale, case):
    hidden, weight, labels = case
    hidden = hidden * np.float32(scale)
    loss, (dh, dw) = compiled(implementation, terms)(hidden, weight, labels)
    for ours, theirs in zip((loss, dh, dw), in_torch(hidden, weight, labels, terms), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * max(1, scale))


@settings(max_examples=8, deadline=None)
@given(
    terms=st.sampled_from(TERMS),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_every_term_and_its_gradients_equal_torch_in_float64(terms, ignored, scale, seed):
    assert_equals_torch("xla", terms, scale, random_case(seed, 19, terms.ignore_index, ignored))


# Each is one slow compile of an interpreted kernel: with a factor, ignored rows in the vocabulary, and without.
@pytest.mark.parametrize("terms", [TERMS[2], TERMS[3]], ids=["factored", "not"])
def test_the_op_with_the_kernel_equals_torch_in_float64(terms):
    for scale, ignored in ((0.1, 0.0), (1.0, 0.5), (10.0, 0.5), (1.0, 1.0)):
        assert_equals_torch("triton", terms, scale, random_case(0, 19, terms.ignore_index, ignored))


def far_logits():
    """Rows whose maximum is in the first tile, in the last, far above the first tile's, and far below; ties."""
    x = 3 * np.random.default_rng(0).standard_normal((7, VOCAB)).astype(np.float32)
    x[1, 50], x[2, 20], x[3, 3], x[4, :16], x[5] = 30.0, 95.0, 95.0, -200.0, 1.0
    return x, np.array([3, 50, 21, 3, 40, 0, IGNORED], np.int32)


@pytest.mark.parametrize(
    ("terms", "dtype"), [(t, jnp.bfloat16) for t in TERMS] + [(TERMS[1], jnp.float32), (TERMS[0], jnp.float16)]
)
def test_kernel_equals_the_reference_however_far_the_maximum_is_from_the_first_tile(terms, dtype):
    x, labels = far_logits()
    run = lambda f, dtype: jax.jit(functools.partial(f, terms=terms, gradient_dtype=dtype, with_accuracy=True))  # noqa: E731
    ours, exact = run(triton.chunk_loss, dtype)(x, labels), run(reference.chunk_loss, jnp.float32)(x, labels)
    trained = labels != terms.ignore_index
    np.testing.assert_allclose(ours.loss[trained], exact.loss[trained], rtol=1e-5, atol=1e-5)
    assert np.array_equal(ours.correct[trained], exact.correct[trained])
    assert ours.gradient.dtype == dtype
    assert (ours.factor is not None) == (dtype != jnp.float16 and not terms.label_smoothing)
    gradient = np.asarray(ours.gradient, np.float32)
    if ours.factor is not None:
        gradient *= ours.factor[:, None]
    half_step = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}[dtype]
    np.testing.assert_allclose(gradient, exact.gradient, rtol=half_step + 1e-5, atol=1e-6)


def test_kernel_without_gradients_reads_losses_and_predictions():
    x, labels = far_logits()
    kwargs = dict(terms=Terms(), gradient_dtype=None, with_accuracy=True)
    ours, exact = triton.chunk_loss(x, labels, **kwargs), reference.chunk_loss(x, labels, **kwargs)
    np.testing.assert_allclose(ours.loss[:6], exact.loss[:6], rtol=1e-6)
    assert np.array_equal(ours.correct, exact.correct) and ours.gradient is None


def test_a_label_outside_the_vocabulary_makes_the_kernels_loss_nan():
    x, labels = far_logits()
    labels[[1, 3]] = VOCAB, -1
    loss = triton.chunk_loss(x, labels, Terms(), gradient_dtype=jnp.float32, with_accuracy=False).loss
    assert np.array_equal(np.isnan(loss[:6]), [False, True, False, True, False, False])


def test_bfloat16_gradients_of_the_kernel_are_as_close_as_the_references():
    hidden, weight, labels = random_case(5, 64)
    hidden, weight = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, weight))
    exact = in_torch(hidden, weight, labels, Terms())
    loss, grads = compiled("triton", Terms())(hidden, weight, labels)
    np.testing.assert_allclose(loss, exact[0], rtol=1e-5)
    for ours, theirs in zip(grads, exact[1:], strict=True):
        # dz, the scaled hidden state of dW, and the result are rounded to bf16, 2**-9 relative each.
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) < 6e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("trained", "chunk_count"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_only_chunks_with_trained_tokens_are_computed(trained, chunk_count):
    hidden, weight, labels = random_case(1, 64, ignored=0.0)
    skipped = np.random.default_rng(trained).permutation(64)[trained:]
    labels[skipped] = IGNORED
    calls = []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return reference.chunk_loss(*args, **kwargs)

    options = dict(chunk_size=8, with_grads=True, train_weight=True, with_accuracy=True)
    sums = jax.jit(functools.partial(chunks.sum_chunks, terms=Terms(), chunk_loss=counted, **options))(
        hidden, weight, labels
    )
    jax.effects_barrier()
    assert len(calls) == chunk_count
    for ours, theirs in zip((sums.loss, sums.dh, sums.dw), in_torch(hidden, weight, labels, Terms()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(sums.dh)[skipped])


@pytest.mark.parametrize(
    ("terms", "with_gradient"), [(TERMS[3], False), (TERMS[0], True), (TERMS[1], True), (TERMS[3], True)]
)
def test_kernel_lowers_for_cuda_without_a_gpu(terms, with_gradient):
    h200 = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h200)
    dtype = jnp.bfloat16 if with_gradient else None
    f = functools.partial(
        triton.chunk_loss, terms=terms, gradient_dtype=dtype, with_accuracy=not with_gradient, interpret=False
    )
    shapes = jax.ShapeDtypeStruct((37, 50257), jnp.float32), jax.ShapeDtypeStruct((37,), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert ("cross_entropy_gradient" if with_gradient else "cross_entropy_loss") in text


@pytest.mark.parametrize(
    "wrong",
    [dict(softcap=0.0), dict(logit_scale=0.0), dict(label_smoothing=-0.1), dict(label_smoothing=1.5), dict(z_loss=-1)],
)
def test_numbers_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        linear_cross_entropy(*random_case(0, 4), chunk_size=4, **wrong)
