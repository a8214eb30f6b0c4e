"""8-bit blockwise quantisation against bitsandbytes on a CPU."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.pallas_kernels.adamw_8bit.codes import thresholds
from fastft_jax.pallas_kernels.nf4 import dynamic_map
from fastft_jax.quant import blockwise

quantize = jax.jit(blockwise.quantize, static_argnames="signed")
dequantize = jax.jit(blockwise.dequantize, static_argnames="signed")


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_equals_bitsandbytes_bit_for_bit(signed):
    assert np.array_equal(dynamic_map(signed), bnb.create_dynamic_map(signed).numpy())


def assert_equals_bitsandbytes(x: np.ndarray, signed: bool):
    codes, state = bnb.quantize_blockwise(torch.tensor(x), code=bnb.create_dynamic_map(signed), blocksize=256)
    ours = quantize(x, signed=signed)
    assert np.array_equal(ours[0], codes.numpy())
    assert np.array_equal(ours[1], state.absmax.numpy())
    decoded = bnb.dequantize_blockwise(codes, state).numpy()
    assert np.array_equal(dequantize(*ours, signed=signed), decoded)


# a few fixed lengths: each is one compile
@given(
    n=st.sampled_from([1, 255, 256, 700]),
    scale=st.floats(-25, 25),
    seed=st.integers(0, 2**32 - 1),
    signed=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_codes_scales_and_decoded_values_equal_bitsandbytes_bit_for_bit(n, scale, seed, signed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 10.0**scale).astype(np.float32)
    x[rng.random(n) < 0.1] = 0
    assert_equals_bitsandbytes(x if signed else np.abs(x), signed)


@pytest.mark.parametrize("signed", [True, False])
def test_values_on_every_edge_between_two_codes_equal_bitsandbytes(signed):
    edges = thresholds(signed)
    near = [edges, np.nextafter(edges, np.float32(2)), np.nextafter(edges, np.float32(-2)), dynamic_map(signed)]
    x = np.clip(np.concatenate(near), -1 if signed else 0, 1)
    x = np.pad(x, (0, -len(x) % 255)).reshape(-1, 255)
    # every block also holds 1.0, so that values are looked up as they are
    assert_equals_bitsandbytes(np.concatenate([np.ones((len(x), 1), np.float32), x], 1).reshape(-1), signed)


def test_blocks_of_zeros_stay_zero():
    assert_equals_bitsandbytes(np.zeros(700, np.float32), True)
    codes, absmax = quantize(jnp.zeros(700))
    assert not np.any(dequantize(codes, absmax))
