"""RMSNorm and LayerNorm kernels on a real card against the float32 reference, at ragged sizes, and their launches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels.layer_norm import layer_norm
from fastft_jax.pallas_kernels.rms_norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(implementation, dtype, x, delta, weight, d_h, dy):
    """Every output and gradient of both norms, of operands cast to dtype."""
    x, delta, weight, d_h, dy = (a.astype(dtype) for a in (x, delta, weight, d_h, dy))
    d = x.shape[-1]
    options = dict(eps=1e-5, room=dy.shape[-1] - d, train_weight=d <= 8192, implementation=implementation)
    results = []
    for plus_one in (False, True):
        outs, vjp = jax.vjp(lambda *args: add_rms_norm(*args, plus_one=plus_one, **options), x, delta, weight)  # noqa: B023
        results += [*outs, *vjp((d_h, dy))]
    y, vjp = jax.vjp(lambda x, w: layer_norm(x, w, w, **options), x, weight)
    results += [y, *vjp(dy)]
    return [r for r in results if r.shape != weight.shape or d <= 8192]


def errors(dtype, *operands):
    """Relative errors (in norm) of the kernels on operands rounded to dtype, against the float32 reference on those."""
    rounded = jax.tree.map(lambda x: jnp.asarray(x, dtype).astype(jnp.float32), operands)
    got, exact = run("triton", dtype, *rounded), run("xla", jnp.float32, *rounded)
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(got, exact, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


# Inputs are the same numbers: what differs is the rounding of results (bfloat16: 2^-9 at most, two of them in a row)
# and the GPU's approximate exponential and reciprocal square root.
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 5e-3, jnp.float16: 7e-4}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "m, d, room", [(1, 64, 0), (37, 128, 16), (333, 1000, 5), (1000, 3584, 64), (257, 4096, 0), (65, 16384, 0)]
)
def test_kernels_equal_the_float32_reference(m, d, room, dtype):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(m, d), (m, d), (d,), (m, d), (m, d + room)]
    operands = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    assert errors(dtype, *operands) < TOLERANCES[dtype]


def test_the_default_is_the_kernel_and_forward_and_backward_are_one_launch_each():
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(2, 100, 4096), (4096,)])

    def loss(x, delta, weight):
        h, y = add_rms_norm(x, delta, weight, eps=1e-5)
        return jnp.sum((h * y).astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, x, weight).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    wide = jax.ShapeDtypeStruct((4, 20000), jnp.bfloat16), jax.ShapeDtypeStruct((20000,), jnp.bfloat16)
    assert "triton" not in jax.jit(functools.partial(rms_norm, eps=1e-5)).lower(*wide).as_text()
