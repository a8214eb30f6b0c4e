"""NF4 encoding and decoding against bitsandbytes itself on a CPU, and its checkpoints."""

import json

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fastft_jax.pallas_kernels.nf4 import reference
from fastft_jax.quant import nf4

quantize = jax.jit(nf4.quantize, static_argnames="double_quant")
dequantize = jax.jit(nf4.dequantize, static_argnums=1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def no_torch_compile():
    """bitsandbytes compiles its fallback for odd widths: a minute of C++ that changes no value."""
    with torch._dynamo.config.patch(disable=True):
        yield


def encode_with_bitsandbytes(w: np.ndarray, dtype: str, double: bool):
    tensor = torch.tensor(np.asarray(w, np.float32)).to(DTYPES[dtype])
    return bnb.quantize_4bit(tensor, compress_statistics=double, quant_type="nf4")


def assert_equals_bitsandbytes(w: np.ndarray, dtype: str, double: bool):
    """Every stored number and every decoded one; `w` float32 values that `dtype` may round."""
    w = np.asarray(jnp.asarray(w).astype(dtype).astype(jnp.float32))
    packed, state = encode_with_bitsandbytes(w, dtype, double)
    q = quantize(jnp.asarray(w).astype(dtype), double_quant=double)
    ours = nf4.to_bitsandbytes(q)
    assert np.array_equal(ours["weight"], packed.numpy())
    if double and w.size % 64 and not w.any():
        # bitsandbytes averages zeros and the 1e-38 it gives a short block of zeros: subnormal numbers, all for nothing
        assert not np.any(dequantize(q, dtype))
        return
    if double:
        # Up to 32,768 blocks torch sums on one thread; with AVX-512 it sums in another order, a few ulp away.
        offset = float(state.offset)
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            assert abs(ours["nested_offset"] - offset) <= 4 * np.spacing(np.float32(offset))
        else:
            assert ours["nested_offset"] == offset
            assert np.array_equal(ours["nested_absmax"], state.state2.absmax.numpy())
            assert np.array_equal(ours["absmax"], state.absmax.numpy())
    else:
        assert np.array_equal(ours["absmax"], state.absmax.numpy())
    decoded = bnb.dequantize_4bit(packed, state).float().numpy()
    if not double or ours["nested_offset"] == float(state.offset):
        assert np.array_equal(dequantize(q, dtype).astype(jnp.float32), decoded)


# every dtype on one shape, every shape with one dtype (a compile each)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((64, 172), "float32"),
        ((64, 172), "bfloat16"),
        ((64, 172), "float16"),
        ((13, 7), "bfloat16"),
        ((1, 1), "float32"),
        ((3, 43), "float16"),
        ((128, 256), "bfloat16"),
    ],
)
def test_every_stored_and_decoded_number_equals_bitsandbytes(shape, dtype, double):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal(shape) * 0.05).astype(np.float32)
    w[1 :: max(1, shape[0] // 4)] = 0
    assert_equals_bitsandbytes(w, dtype, double)


@given(
    exponent=st.floats(-30, 30),
    spread=st.floats(0, 6),
    zeros=st.sampled_from([0.0, 0.3, 0.98, 1.0]),
    shape=st.sampled_from([(64, 172), (13, 7)]),  # ragged last blocks, an odd count, rows that share a block
    dtype=st.sampled_from(list(DTYPES)),
    double=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_any_scale_and_sparsity_equals_bitsandbytes(exponent, spread, zeros, shape, dtype, double, seed):
    if dtype == "float16":
        exponent, spread = exponent / 10, spread / 3  # float16's range; its subnormals are ordinary float32 numbers
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(shape) * 10.0 ** (exponent + spread * rng.uniform(-1, 0, shape))).astype(np.float32)
    w[rng.random(shape) < zeros] = 0
    assert_equals_bitsandbytes(w, dtype, double)


def test_midpoints_and_their_neighbours_equal_bitsandbytes():
    code = nf4.NF4_CODE
    midpoints = (code[1:] + code[:-1]) / np.float32(2)
    up, down = np.nextafter(midpoints, np.float32(2)), np.nextafter(midpoints, np.float32(-2))
    block = np.concatenate([[1.0], midpoints, up, down, code, [-0.0, 0.0]]).astype(np.float32)
    assert block.size == 64
    for scale in (1.0, 0.5, 3.0, 0.0123):  # powers of two keep the ties exact, the others round x * (1 / absmax)
        assert_equals_bitsandbytes((block * np.float32(scale))[None].repeat(3, 0), "float32", False)
        assert_equals_bitsandbytes((block * np.float32(scale))[None, :50].repeat(3, 0), "float32", False)


def test_subnormal_weights_count_as_zero_and_are_off_by_less_than_the_smallest_normal():
    w = np.full((2, 64), 1e-39, np.float32)
    w[1] = 0.01
    w[1, 0] = 1e-40
    packed, state = encode_with_bitsandbytes(w, "float32", False)
    ours = dequantize(quantize(w, double_quant=False), jnp.float32)
    assert np.all(np.abs(ours - bnb.dequantize_4bit(packed, state).numpy()) < 2.0**-126)


def test_an_offset_with_torchs_bits_above_32768_blocks_needs_torch_on_one_thread():
    w = (np.random.default_rng(0).standard_normal((2112, 1024)) * 0.02).astype(np.float32)  # 33,792 blocks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_equals_bitsandbytes(w, "bfloat16", True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("folder, double", [("stories260k-nf4", False), ("stories260k-nf4-dq", True)])
def test_a_bitsandbytes_checkpoint_round_trips_and_decodes_to_its_values(shared_data, folder, double):
    tensors = load_file(shared_data / "bnb" / folder / "model.safetensors")
    names = [n.removesuffix(".absmax") for n in tensors if n.endswith(".weight.absmax")]
    assert names
    for name in names:
        state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"]))
        assert state["blocksize"] == 64
        q = nf4.from_bitsandbytes(
            tensors[name],
            tensors[f"{name}.absmax"],
            tuple(state["shape"]),
            tensors.get(f"{name}.nested_absmax"),
            state.get("nested_offset"),
        )
        back = nf4.to_bitsandbytes(q)
        stored = {"weight": tensors[name]} | {
            k.removeprefix(name + "."): v
            for k, v in tensors.items()
            if k.startswith(name + ".") and "quant_state" not in k
        }
        assert back.keys() == stored.keys() | ({"nested_offset"} if double else set())
        for key, value in stored.items():
            assert np.array_equal(back[key], value), (name, key)
        code = torch.tensor(stored["quant_map"])
        if double:
            nested = bnb.QuantState(
                torch.tensor(stored["nested_absmax"]), code=torch.tensor(stored["nested_quant_map"]), blocksize=256
            )
            nested.dtype = torch.float32
        else:
            nested = None
        quant_state = bnb.QuantState(
            torch.tensor(stored["absmax"]),
            torch.Size(state["shape"]),
            code,
            64,
            "nf4",
            torch.float32,
            torch.tensor(state["nested_offset"]) if double else None,
            nested,
        )
        decoded = bnb.dequantize_4bit(torch.tensor(stored["weight"]), quant_state).numpy()
        assert np.array_equal(dequantize(q, jnp.float32), decoded)


def test_stack_is_sliced_by_scan_into_the_matrices_it_was_made_of():
    rng = np.random.default_rng(0)
    parts = [quantize(rng.standard_normal((24, 40)).astype(np.float32)) for _ in range(3)]
    stacked = nf4.stack(parts)
    assert stacked.codes.shape == (3, 15, 32) and stacked.shape == (24, 40)
    _, decoded = jax.lax.scan(lambda _, q: (None, dequantize(q, jnp.float32)), None, stacked)
    for ours, part in zip(decoded, parts, strict=True):
        assert np.array_equal(ours, dequantize(part, jnp.float32))
    with pytest.raises(ValueError, match="one shape"):
        nf4.stack([parts[0], quantize(np.zeros((24, 41), np.float32))])


def test_a_stack_that_kernels_cannot_address_is_copied_a_layer_at_a_time(monkeypatch):
    w = np.random.default_rng(3).standard_normal((3, 64, 128)).astype(np.float32)
    stacked = nf4.stack([nf4.quantize(jnp.asarray(each)) for each in w])
    assert stacked.at(jnp.int32(1)).layer is not None
    expected = nf4.dequantize(stacked.at(jnp.int32(1)), jnp.float32)
    monkeypatch.setattr(reference, "MAX_CODE_BYTES", stacked.codes.size // 2 - 1)  # offsets of 64 bits
    assert stacked.at(jnp.int32(1)).layer is not None
    monkeypatch.setattr(reference, "MAX_CODE_BYTES", stacked.codes.size // 2)
    alone = jax.jit(lambda stacked, i: stacked.at(i))(stacked, 1)
    assert alone.layer is None and alone.codes.shape == stacked.codes.shape[1:]
    np.testing.assert_array_equal(nf4.dequantize(alone, jnp.float32), expected)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="int32"):
        nf4.quantize(jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"shape \(3, 64\)"):
        nf4.from_bitsandbytes(np.zeros((64, 1), np.uint8), np.zeros(2, np.float32), (3, 64))
