"""Scaling to fp8 and back: kernels against references, references against numpy, and what a GPU would be given."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cuda_lowering import cuda_text, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fastft_jax.pallas_kernels import fp8, pallas
from fastft_jax.pallas_kernels.fp8.cases import CASES

IN_NUMPY = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
INTERPRETED = {"xla": "xla", "kernel": "triton"}


def bits(x8) -> np.ndarray:
    return np.asarray(x8).view(np.uint8)


def normal(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    m=st.sampled_from([1, 3]),
    k=st.sampled_from([1, 40, 64, 100, 4097]),
    unread=st.sampled_from([0, 7]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    format=st.sampled_from(["e4m3", "e5m2"]),
)
def test_kernel_equals_reference_bit_for_bit_and_numpy_within_one_step(seed, m, k, unread, dtype, format):
    rng = np.random.default_rng(seed)
    x = normal(rng, (m, k + unread), dtype) * jnp.asarray(10.0 ** rng.integers(-3, 3), dtype)
    x = x.at[:, k:].set(60000)  # must not count
    kernel, plain = (fp8.quantise_rows(x, columns=k, format=format, implementation=i) for i in ("triton", "xla"))
    assert np.array_equal(bits(kernel[0]), bits(plain[0])) and np.array_equal(kernel[1], plain[1])
    x = np.asarray(x[:, :k], np.float64)
    scale = np.abs(x).max(axis=1) / fp8.LARGEST[format]
    scale = np.where(scale == 0, 1, scale)
    np.testing.assert_allclose(plain[1], scale, rtol=3e-7)  # two float32 roundings
    # a value next to the middle of two 8-bit ones may go the other way: by one code, rarely
    expected = (x / scale[:, None]).astype(IN_NUMPY[format])
    off = np.abs(bits(plain[0]).astype(int) - bits(expected).astype(int))
    assert off.max() <= 1 and (off > 0).mean() < 0.01 + 1 / off.size
    assert np.abs(np.asarray(plain[0], np.float64)).max() in (0, fp8.LARGEST[format])


@pytest.mark.parametrize("implementation", INTERPRETED.values(), ids=INTERPRETED)
def test_rows_without_a_size_keep_their_meaning(implementation):
    x = jnp.zeros((4, 64)).at[1, 3].set(2.0**-120).at[2, 3].set(jnp.inf).at[3, 3].set(jnp.nan)
    x8, scale = fp8.quantise_rows(x, implementation=implementation)
    back = np.asarray(jnp.asarray(x8, jnp.float32) * scale[:, None])
    assert not np.any(back[:2]) and np.array_equal(scale[:2], [1, 1])
    assert np.isnan(back[2, 3]) and np.isnan(back[3, 3])


@pytest.mark.parametrize("m, n, r", [(3, 40, 64), (70, 200, 128)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rescaling_and_a_low_rank_product_are_rounded_once(m, n, r, dtype):
    rng = np.random.default_rng(m)
    operands = [normal(rng, s, d) for s, d in (((m, n), dtype), ((m,), jnp.float32), ((m, r), dtype), ((n, r), dtype))]
    sums, scale, h, b = (np.asarray(a, np.float64) for a in operands)
    exact = sums * scale[:, None] + h @ b.T
    for implementation in ("triton", "xla"):
        y = fp8.rescale_add(*operands, implementation=implementation)
        assert y.dtype == dtype
        step = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6  # half an ulp is 2**-9
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=step, atol=1e-4)


def test_the_product_of_8_bit_matrices_is_exact_on_a_cpu():
    rng = np.random.default_rng(0)
    x8, w8 = (fp8.quantise_rows(normal(rng, (n, 40)), format=f)[0] for n, f in ((5, "e5m2"), (7, "e4m3")))
    exact = np.asarray(x8, np.float64) @ np.asarray(w8, np.float64).T
    np.testing.assert_allclose(fp8.matmul(x8, w8, jnp.float32), exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())


def test_on_a_gpu_the_product_stays_in_8_bits_and_names_its_algorithm(monkeypatch):
    monkeypatch.setattr(pallas, "on_gpu", lambda: True)
    h200 = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h200)
    x8, w8 = (jax.ShapeDtypeStruct((n, 64), fp8.DTYPES["e4m3"]) for n in (32, 48))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(fp8.matmul).trace(x8, w8).lower(lowering_platforms=("cuda",)).as_text()
    (dot,) = [line for line in text.splitlines() if "dot_general" in line]
    assert dot.count("f8E4M3FN") >= 2 and "allow_imprecise_accumulation = true" in dot and "xbf16>" in dot


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_lowers_for_cuda_to_one_kernel(case):
    assert kernels(cuda_text(case)) == 1


def test_wrong_operands_and_names_are_refused():
    x = jnp.zeros((2, 64))
    with pytest.raises(ValueError, match="65 columns"):
        fp8.quantise_rows(x, columns=65)
    with pytest.raises(ValueError, match="unknown 8-bit format 'e3m4'"):
        fp8.quantise_rows(x, format="e3m4")
    with pytest.raises(ValueError, match="unknown fp8 implementation 'cuda'"):
        fp8.quantise_rows(x, implementation="cuda")
    with pytest.raises(ValueError, match="cannot add"):
        fp8.rescale_add(x, jnp.zeros(2), jnp.zeros((2, 60)), jnp.zeros((64, 60)))
