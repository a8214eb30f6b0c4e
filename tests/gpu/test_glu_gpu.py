"""Gated linear unit kernels on a real card against the float32 reference, at ragged sizes, and their launches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels.glu import glu, glu_backward
from fastft_jax.pallas_kernels.glu.activations import normal

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(implementation, dtype, activation, gate_up, d_act):
    """The unit, its gradient, and both again from the backward function, of operands cast to dtype."""
    gate_up, d_act = gate_up.astype(dtype), d_act.astype(dtype)
    options = dict(activation=activation, room=d_act.shape[-1] - gate_up.shape[-1] // 2, implementation=implementation)
    y, vjp = jax.vjp(lambda x: glu(x, **options), gate_up)
    return y, *vjp(d_act), *glu_backward(gate_up, d_act, **options)


# Inputs are the same numbers: what differs is the rounding of results (bfloat16: 2^-9 at most, two of them in a row)
# and the GPU's approximate exponential and division.
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 5e-3, jnp.float16: 7e-4}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "clamped_silu"])
@pytest.mark.parametrize("m, f, room", [(1, 64, 0), (37, 1000, 5), (333, 3584, 64), (5, 18944, 0)])
def test_kernels_equal_the_float32_reference(m, f, room, activation, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    gate_up, d_act = (
        (3 * jax.random.normal(key, (m, columns))).astype(dtype).astype(jnp.float32)  # some beyond the clamp
        for key, columns in zip(keys, (2 * f, f + room), strict=True)
    )
    results = [run(*how, activation, gate_up, d_act) for how in (("triton", dtype), ("xla", jnp.float32))]
    for got, exact in zip(*results, strict=True):
        got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
        assert np.linalg.norm(got - exact) < TOLERANCES[dtype] * np.linalg.norm(exact)
    y = results[0][0]
    assert not np.any(y[:, f:])


@pytest.mark.parametrize("activation", ["silu", "clamped_silu"])
def test_rows_times_weights_equal_the_float32_reference(activation):
    """Values, both gradients, and all again from the backward function, of rows of more than one program."""
    keys = jax.random.split(jax.random.key(1), 3)
    gate_up, d_act = (
        (3 * jax.random.normal(key, (333, columns))).astype(jnp.bfloat16)
        for key, columns in zip(keys[:2], (2 * 5000, 5000), strict=True)
    )
    weight = jax.random.uniform(keys[2], (333,))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(implementation, dtype):
        options = dict(activation=activation, implementation=implementation)
        x, d = gate_up.astype(dtype), d_act.astype(dtype)
        y, vjp = jax.vjp(lambda x, w: glu(x, row_weight=w, **options), x, weight)
        return y, *vjp(d), *glu_backward(x, d, row_weight=weight, **options)

    for got, exact in zip(run("triton", jnp.bfloat16), run("xla", jnp.float32), strict=True):
        got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
        assert np.linalg.norm(got - exact) < TOLERANCES[jnp.bfloat16] * np.linalg.norm(exact)


def test_the_normal_law_is_accurate_with_this_cards_exponential():
    x = np.linspace(-10, 10, 100_001, dtype=np.float32)
    cdf, _ = jax.jit(normal)(x)
    exact = jax.jit(lambda x: jax.lax.erf(x * np.float32(0.5**0.5)))(x)
    # Three float32 ulps below one for the kernel's formula, as many for XLA's own erf of a rounded argument.
    assert np.abs(2 * np.asarray(cdf, np.float64) - 1 - np.asarray(exact, np.float64)).max() < 4e-7


def test_the_default_is_the_kernel_and_forward_and_backward_are_one_launch_each():
    gate_up = jax.ShapeDtypeStruct((2, 64, 2 * 1000), jnp.bfloat16)
    loss = lambda x: jnp.sum(glu(x).astype(jnp.float32) ** 2)  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(gate_up).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
