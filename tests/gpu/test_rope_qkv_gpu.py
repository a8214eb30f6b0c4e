"""The fused rotary kernel on a real card against the float32 reference, at the layouts of several families."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels.rope import rope_qkv

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(implementation, dtype, layout, qkv, tables, norms, cotangents):
    """q, k, v and the gradient of qkv, of operands cast to dtype; layout: heads, key heads, plus_one."""
    qkv, norms, cotangents = jax.tree.map(lambda x: x.astype(dtype), (qkv, norms, cotangents))
    n, k, plus_one = layout
    options = dict(num_heads=n, num_kv_heads=k, head_dim=cotangents[0].shape[-1], implementation=implementation)
    if norms:
        options |= dict(q_norm=norms[0], k_norm=norms[1], eps=1e-6, plus_one=plus_one)
    outs, vjp = jax.vjp(lambda qkv: rope_qkv(qkv, *tables, **options), qkv)
    return *outs, *vjp(cotangents)


# Inputs are the same numbers: what differs is the rounding of results (bfloat16: 2^-9 at most, three of them in a row
# with norms) and the GPU's approximate reciprocal square root.
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 7e-3, jnp.float16: 9e-4}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "n, k, h, half, normed, plus_one",
    [
        pytest.param(32, 8, 128, 64, False, False, id="llama"),
        pytest.param(32, 8, 128, 64, True, False, id="qwen3"),
        pytest.param(28, 4, 128, 64, False, False, id="qwen2"),
        pytest.param(4, 1, 256, 128, True, True, id="gemma3"),
        pytest.param(32, 32, 96, 48, False, False, id="phi3-mini"),
        pytest.param(6, 3, 80, 16, True, False, id="partial"),
    ],
)
def test_kernel_equals_the_float32_reference(n, k, h, half, normed, plus_one, dtype):
    b, t = 3, 37
    keys = jax.random.split(jax.random.key(0), 7)
    angles = jax.random.normal(keys[0], (b, t, half))
    qkv = jax.random.normal(keys[1], (b, t, (n + 2 * k) * h))
    norms = tuple(jax.random.normal(key, (h,)) for key in keys[2:4]) if normed else ()
    cotangents = tuple(jax.random.normal(key, (b, t, heads, h)) for key, heads in zip(keys[4:], (n, k, k), strict=True))
    qkv, norms, cotangents = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), (qkv, norms, cotangents))
    args = ((n, k, plus_one), qkv, (jnp.cos(angles), jnp.sin(angles)), norms, cotangents)
    for got, exact in zip(run("triton", dtype, *args), run("xla", jnp.float32, *args), strict=True):
        got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
        assert np.linalg.norm(got - exact) < TOLERANCES[dtype] * np.linalg.norm(exact)


def test_the_default_is_the_kernel_and_forward_and_backward_are_one_launch_each():
    qkv = jax.ShapeDtypeStruct((2, 64, 48 * 128), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)

    def loss(qkv, cos, sin):
        parts = rope_qkv(qkv, cos, sin, num_heads=32, num_kv_heads=8, head_dim=128)
        return sum(jnp.sum((part * part).astype(jnp.float32)) for part in parts)

    text = jax.jit(jax.grad(loss)).lower(qkv, table, table).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
