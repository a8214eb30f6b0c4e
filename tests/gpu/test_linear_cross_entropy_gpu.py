"""The head loss on a real card: the kernel between the GEMMs against float32 logits and float64 sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels.linear_cross_entropy import linear_cross_entropy, reference, triton
from fastft_jax.pallas_kernels.linear_cross_entropy.reference import Terms

pytestmark = pytest.mark.gpu

TERMS = [Terms(), Terms(softcap=30.0), Terms(logit_scale=0.25, label_smoothing=0.1, z_loss=1e-4)]


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@pytest.mark.parametrize("vocab", [50257, 128256])  # the first with a ragged tile and rows that are not aligned
@pytest.mark.parametrize("terms", TERMS, ids=range(len(TERMS)))
def test_kernel_equals_the_formula_in_float64(terms, vocab):
    rng = np.random.default_rng(0)
    x = 4 * rng.standard_normal((37, vocab), np.float32)
    labels = rng.integers(0, vocab, 37).astype(np.int32)
    labels[5], x[9, 40_000], x[10, 40_001], labels[10] = -100, 120.0, 120.0, 40_001  # far above the first tile
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2.0**-8)):
        f = functools.partial(triton.chunk_loss, terms=terms, gradient_dtype=dtype, with_accuracy=True)
        ours = jax.jit(f)(x, labels)
        z = terms.logit_scale * x.astype(np.float64)
        t = np.tanh(z / terms.softcap) if terms.softcap else 0 * z
        z = terms.softcap * t if terms.softcap else z
        lse = np.logaddexp.reduce(z, axis=1)
        target = z[np.arange(37), labels]
        eps, zeta = terms.label_smoothing, terms.z_loss
        loss = lse - (1 - eps) * target - eps * z.mean(1) + zeta * lse**2
        gradient = np.exp(z - lse[:, None]) * (1 + 2 * zeta * lse)[:, None] - eps / vocab
        gradient[np.arange(37), labels] -= 1 - eps
        gradient *= terms.logit_scale * (1 - t * t)
        gradient[5] = 0
        trained = labels != -100
        # log-sum-exp minus a logit: where the label has nearly all of the mass, float32's ulp of the two is left
        np.testing.assert_allclose(ours.loss[trained], loss[trained], rtol=1e-5, atol=4e-6)
        # Against float32's own argmax: softcap makes ties.
        exact = reference.chunk_loss(x, labels, terms, gradient_dtype=None, with_accuracy=True)
        assert np.array_equal(ours.correct[trained], exact.correct[trained])
        scaled = np.asarray(ours.gradient, np.float64)
        if ours.factor is not None:
            scaled *= np.asarray(ours.factor, np.float64)[:, None]
        # softcap's slope 1 - tanh^2 is a difference of numbers near 1: a few float32 ulps of 1 are its absolute error
        atol = 1e-6 if terms.softcap else 1e-7
        np.testing.assert_allclose(scaled, gradient, rtol=tolerance + 1e-4, atol=atol)


@pytest.mark.parametrize("train_weight", [False, True])
def test_loss_and_gradients_with_the_kernel_equal_those_without(train_weight):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1000, 384), jnp.bfloat16)
    weight = (0.2 * jax.random.normal(keys[1], (32001, 384), jnp.float32)).astype(jnp.bfloat16)
    labels = jnp.where(jnp.arange(1000) % 3 == 0, -100, jax.random.randint(keys[2], (1000,), 0, 32001))

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, hidden, weight):
        options = dict(chunk_size=256, train_weight=train_weight, implementation=implementation)
        f = lambda h, w: linear_cross_entropy(h, w, labels, **options)[0]  # noqa: E731
        return jax.value_and_grad(f, (0, 1))(hidden, weight)

    (loss, grads), (wanted, exact) = (run(name, hidden, weight) for name in ("triton", "xla"))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for ours, theirs in zip(grads, exact, strict=True):
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        assert np.linalg.norm(ours - theirs) <= 6e-3 * np.linalg.norm(theirs)
    assert not np.any(np.asarray(grads[0], np.float32)[::3])
