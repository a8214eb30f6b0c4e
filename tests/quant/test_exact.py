"""Division and sums whose bits do not depend on the compiler or the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.quant import exact

divide = jax.jit(exact.divide)


def test_division_is_correctly_rounded_over_the_whole_normal_range():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(200_000) * 10.0 ** rng.uniform(-18, 18, 200_000)).astype(np.float32)
    a = np.abs(rng.standard_normal(200_000) * 10.0 ** rng.uniform(-18, 18, 200_000)).astype(np.float32)
    assert np.array_equal(divide(x, a), x / a)  # numpy divides as IEEE 754 says


@given(guess_error=st.integers(-3, 3), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_division_does_not_trust_the_last_bits_of_the_devices_quotient(guess_error, seed):
    rng = np.random.default_rng(seed)
    x, a = rng.integers(2**23, 2**24, (2, 500))  # significands
    shift = 23 + (x < a)
    q = exact._round_quotient(
        *(jnp.asarray(t.astype(np.int32)) for t in (x << shift, a, (x << shift) // a + guess_error))
    )
    remainder = (x << shift) - np.asarray(q, np.int64) * a
    assert np.all(np.abs(2 * remainder) <= a)


def test_division_of_zeros_and_out_of_range_quotients():
    x = np.array([0.0, -0.0, 1.0, 1e-30, 1e30, -1e30], np.float32)
    a = np.array([3.0, 3.0, 0.0, 1e30, 1e-30, 1e-30], np.float32)
    assert np.array_equal(divide(x, a), np.array([0, 0, 0, 0, np.inf, -np.inf], np.float32))


def torch_lanes() -> int:
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


@pytest.mark.parametrize("n", [1, 7, 8, 31, 33, 172, 511, 4096, 8200, 100_003, 917_504])
def test_sum_and_mean_have_torchs_bits(n):
    threads = torch.get_num_threads()
    x = np.abs(np.random.default_rng(n).standard_normal(n)).astype(np.float32)
    torch.set_num_threads(1)  # above 32,768 elements torch splits a sum over its threads
    try:
        total, mean = torch.tensor(x).sum().numpy(), torch.tensor(x).mean().numpy()
    finally:
        torch.set_num_threads(threads)
    lanes = torch_lanes()
    assert np.array_equal(jax.jit(exact.cascade_sum, static_argnums=1)(x, lanes), total)
    assert np.array_equal(jax.jit(exact.cascade_mean, static_argnums=1)(x, lanes), mean)


def test_sum_is_within_4_ulp_of_the_true_sum():
    # 20 roundings of partial sums at most, each half an ulp of a part of the result, mostly cancelling
    x = np.abs(np.random.default_rng(3).standard_normal(100_000)).astype(np.float32)
    true = x.astype(np.float64).sum()
    assert abs(float(jax.jit(exact.cascade_sum)(x)) - true) <= 4 * np.spacing(np.float32(true))
