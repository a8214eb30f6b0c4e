"""Products of a few rows with NF4 stacks, also with those that the kernel cannot address."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels.quantised_matmul import quantised_matmul
from fastft_jax.quant import few_rows, nf4


@pytest.mark.parametrize("limit", [1, 2])
def test_a_stack_beyond_the_kernels_reach_gives_its_matrix_alone(limit, monkeypatch):
    """`limit`: how many of the two layers the kernel can address. Which stack it gets, and the reference's values."""
    rng, seen = np.random.default_rng(0), []
    codes, absmax = rng.integers(0, 256, (2, 12, 32), dtype=np.uint8), rng.uniform(0, 1, (2, 12))
    stacked = nf4.NF4Array(jnp.asarray(codes), jnp.asarray(absmax, jnp.float32), None, None, (12, 64))
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)

    def product(x, codes, *rest, **options):
        seen.append(codes.shape)
        return quantised_matmul(x, codes, *rest, implementation="xla", **options)

    monkeypatch.setattr(few_rows.pallas, "on_gpu", lambda: True)
    monkeypatch.setattr(few_rows, "supported", lambda rows, shape, dtype, layers: layers <= limit)
    monkeypatch.setattr(few_rows, "quantised_matmul", product)
    y = few_rows.few_row_product(x, [stacked.at(jnp.int32(1))])
    assert seen == [(2, 12, 32) if limit == 2 else (12, 32)]
    values = nf4.NF4_CODE[np.concatenate([codes[1] >> 4, codes[1] & 15], axis=1)] * absmax[1][:, None]
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ values.T, rtol=1e-5, atol=1e-5)
