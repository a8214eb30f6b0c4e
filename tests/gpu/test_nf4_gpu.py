"""NF4 decoding on a real card where only 64-bit offsets reach: stacks of more than 4 GiB of codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels import nf4

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    if jax.local_devices()[0].memory_stats()["bytes_limit"] < 20 * 2**30:
        pytest.skip("needs 20 GiB")


def test_experts_beyond_4_gib_are_decoded_where_they_lie():
    """The first and the last layer of 19, 8 experts of Mixtral's size each, 4.5 GB; two of them in double quantisation
    and in one buffer, every other matrix of which is left alone."""
    shape, layers, experts = (14336, 4096), 19, 8
    groups = shape[0] * shape[1] // 64
    keys = jax.random.split(jax.random.key(0), 3)
    one_layer = jax.random.bits(keys[0], (1, experts, groups, 32), jnp.uint8)
    differ = jax.jit(lambda codes: codes ^ jnp.arange(layers, dtype=jnp.uint8)[:, None, None, None])
    codes = differ(one_layer).reshape(layers * experts, groups, 32)
    absmax = jax.random.bits(keys[1], (layers * experts, groups), jnp.uint8)
    scale = jax.random.uniform(keys[2], (layers * experts, groups // 256)) * 0.01
    offset = jnp.linspace(0.02, 0.03, layers * experts)
    assert codes.size > 2**32 and nf4.kernel_takes(codes)

    @jax.jit
    def decoded(stacked, matrix):
        place = dict(shape=shape, size=(4 * shape[0], shape[1]), row=shape[0], count=2, step=2 * shape[0])
        buffer = jnp.zeros(place["size"], jnp.bfloat16)
        return nf4.decode_into(buffer, *stacked, matrix, **place, dtype=jnp.bfloat16).reshape(4, -1)

    @jax.jit
    def expected(stacked, matrix):
        one = [jax.lax.dynamic_index_in_dim(a, matrix, keepdims=False) for a in stacked]
        return nf4.dequantize(*one, dtype=jnp.bfloat16, implementation="xla").reshape(-1)

    stacked = codes, absmax, scale, offset
    for first in (0, (layers - 1) * experts + 6):
        out = decoded(stacked, jnp.int32(first))
        for place, matrix in ((1, first), (3, first + 1)):
            np.testing.assert_array_equal(out[place], expected(stacked, jnp.int32(matrix)))
        assert not jnp.any(out[0]) and not jnp.any(out[2])
