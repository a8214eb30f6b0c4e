"""Grouped products: every row meets its own group's matrix, in the kernels as in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from cuda_lowering import cuda_text, kernels

from fastft_jax.pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_transposed, grouped_outer
from fastft_jax.pallas_kernels.grouped_matmul.cases import CASES

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = CASES[-8:-2]  # two with Hopper's tiles, three in bfloat16, one in float32


def in_float64(name: str, lhs, rhs, *rest) -> np.ndarray:
    *low_rank, sizes = rest
    if low_rank:
        return in_float64(name, lhs, rhs, sizes) + in_float64(name, *low_rank, sizes)
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    group = np.repeat(np.arange(len(sizes)), sizes)
    match name:
        case "grouped_matmul":
            return np.stack([x @ rhs[e].T for x, e in zip(lhs, group, strict=True)])
        case "grouped_transposed":
            return np.stack([y @ rhs[e] for y, e in zip(lhs, group, strict=True)])
        case "grouped_outer":
            return np.stack([lhs[group == e].T @ rhs[group == e] for e in range(len(sizes))])


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernel_and_reference_are_the_float64_products(case):
    """Groups are uneven, and one is empty. The bound: float32 sums of at most 300 products of normal numbers, then for
    bfloat16 results one rounding of values up to 60."""
    *factors, sizes = case.draw(0)
    assert 0 in np.asarray(sizes) and int(sizes.sum()) == factors[0].shape[0]
    wanted = in_float64(case.name.partition("/")[0].removesuffix("_hopper"), *factors, np.asarray(sizes))
    for function in (case.run, case.reference):
        ours = function(*factors, sizes)
        rounded, ours = ours.dtype == jnp.bfloat16, np.asarray(ours.astype(jnp.float32))
        np.testing.assert_allclose(ours, wanted, rtol=2**-8 if rounded else 1e-6, atol=1e-4)


def test_every_kernel_lowers_for_a_gpu():
    assert [kernels(cuda_text(case)) for case in CASES[:8] + CASES[-5:]] == [1] * 13


def test_shapes_and_names_that_do_not_fit_are_refused():
    x, w, sizes = jnp.ones((6, 4)), jnp.ones((2, 3, 4)), jnp.array([4, 2])
    assert grouped_matmul(x, w, sizes).shape == (6, 3)
    with pytest.raises(ValueError, match="do not fit together"):
        grouped_matmul(x, w, sizes, (jnp.ones((6, 2)), jnp.ones((2, 4, 2))))
    with pytest.raises(ValueError, match="do not fit together in 2 groups"):
        grouped_matmul_transposed(x, w, sizes)
    with pytest.raises(ValueError, match="do not fit together"):
        grouped_outer(x, x[:5], sizes)
    with pytest.raises(ValueError, match="'mosaic'"):
        grouped_matmul(x, w, sizes, implementation="mosaic")
