"""8-bit Adam on a real card: the kernel against the reference on the same card, and codes against those of a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels.adamw_8bit import BLOCK, Moment, adam_8bit, encode

pytestmark = pytest.mark.gpu

GROUPS = 1001


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


def operands():
    rng = np.random.default_rng(0)
    draw = lambda: rng.standard_normal((GROUPS, BLOCK)) * 10.0 ** rng.uniform(-4, 0, (GROUPS, BLOCK))  # noqa: E731
    grad, m, v = (draw().astype(np.float32) for _ in range(3))
    grad[3] = m[3] = v[3] = 0
    return grad, Moment(*encode(m, True)), Moment(*encode(v * v, False)), jnp.float32(0.271), jnp.float32(0.0547)


def step(implementation, *args, b1=0.9, b2=0.999):
    return jax.jit(functools.partial(adam_8bit, b1=b1, b2=b2, eps=1e-8, implementation=implementation))(*args)


def test_codes_are_those_of_a_cpu_bit_for_bit():
    grad, m, v, *corrections = operands()
    # Without memory the new moments are g and g^2, whatever is contracted: only the quantisation is left.
    _, ours_m, ours_v = step("triton", grad, m, v, *corrections, b1=0.0, b2=0.0)
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = encode(jnp.asarray(grad), True), encode(jnp.asarray(grad * grad), False)
    for ours, theirs in zip((ours_m, ours_v), wanted, strict=True):
        assert np.array_equal(ours.codes, theirs[0]) and np.array_equal(ours.absmax, theirs[1])


def test_kernel_equals_the_reference_up_to_float32_rounding():
    args = operands()
    (update, *moments), (wanted, *references) = (step(i, *args) for i in ("triton", "xla"))
    np.testing.assert_allclose(update, wanted, rtol=2e-5, atol=1e-5)
    for ours, theirs in zip(moments, references, strict=True):
        np.testing.assert_allclose(ours.absmax, theirs.absmax, rtol=1e-6)
        # A moment on the edge of two codes falls to either side, as the last bit before it has it.
        apart = np.abs(np.asarray(ours.codes, np.int32) - theirs.codes)
        assert apart.max() <= 1 and np.mean(apart) < 1e-3
