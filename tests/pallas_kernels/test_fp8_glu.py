"""The kernels around fp8 products: each against its reference, and the reference against the ops that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.pallas_kernels import fp8, pallas
from fastft_jax.pallas_kernels.fp8 import Scaled
from fastft_jax.pallas_kernels.glu import glu, glu_backward
from fastft_jax.pallas_kernels.rms_norm import rms_norm

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def product(rng, m: int, n: int, r: int, dtype, stack: int = 0) -> Scaled:
    """Sums of hundreds with scales that bring them to 1 or so; r = 0: without adapters."""
    shape = (stack, m, n) if stack else (m, n)
    sums, scale = 300 * normal(rng, *shape, dtype=dtype), jnp.asarray(rng.uniform(0.001, 0.006, m), jnp.float32)
    if not r:
        return Scaled(sums, scale)
    return Scaled(sums, scale, normal(rng, m, r, dtype=dtype), 0.2 * normal(rng, n, r, dtype=dtype))


def diagonal(gate_up: Scaled, ranks) -> Scaled:
    """b with zeros outside of each half's ranks."""
    b, half = np.zeros(gate_up.b.shape, np.float32), gate_up.b.shape[0] // 2
    for at, (start, stop) in zip((slice(0, half), slice(half, None)), ranks, strict=True):
        b[at, start:stop] = gate_up.b[at, start:stop]
    return gate_up._replace(b=jnp.asarray(b, gate_up.b.dtype))


def finished(p: Scaled, dtype):
    """Today's ops for it: `rescale_add`, or a plain scaling."""
    if p.h is None:
        return (p.sums.astype(jnp.float32) * p.scale[:, None]).astype(dtype)
    return fp8.rescale_add(p.sums, p.scale, p.h, p.b, implementation="xla")


def close(a, b, dtype) -> None:
    """Equal but for sums in another order, and gelu_tanh's tails: in 16 bits most values are the same."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    tolerance = {jnp.float32: 1e-6, jnp.bfloat16: 1e-3, jnp.float16: 2e-4}[dtype]
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
    assert dtype == jnp.float32 or np.mean(a != b) < 0.1


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    m=st.sampled_from([1, 37, 70]),
    f=st.sampled_from([40, 100, 192, 344]),  # 344 is to 128 what 11008 is to 4096
    ranks=st.sampled_from([None, ((0, 32), (32, 64)), ((0, 0), (0, 7)), ((0, 70), (70, 86))]),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    stacked=st.booleans(),
)
def test_glu_kernels_equal_the_reference_and_that_the_ops_apart(m, f, ranks, activation, dtype, stacked):
    rng = np.random.default_rng(m + f)
    r = 0 if ranks is None else -(-ranks[1][1] // 64) * 64
    gate_up, d_act = product(rng, m, 2 * f, r, dtype, stack=3 * stacked), product(rng, m, f, min(r, 64), dtype)
    gate_up = gate_up if ranks is None else diagonal(gate_up, ranks)
    index = jnp.int32(1) if stacked else None
    options = dict(dtype=dtype, activation=activation)
    with_d = None if ranks is None else (*ranks, (0, 64))

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, gate_up, d_act, index):
        here = options | {"index": index, "implementation": implementation}
        act = fp8.rescale_glu(gate_up, ranks=ranks, **here)
        return act, *fp8.rescale_glu_backward(gate_up, d_act, ranks=with_d, **here)

    kernel, plain = run("triton", gate_up, d_act, index), run("xla", gate_up, d_act, index)
    assert [(a.shape, a.dtype) for a in kernel] == [((m, f), dtype), ((m, 2 * f), dtype), ((m, f), dtype)]
    assert np.array_equal(kernel[0], kernel[2])
    for a, b in zip(kernel, plain, strict=True):
        close(a, b, dtype)
    one = gate_up._replace(sums=gate_up.sums[1]) if stacked else gate_up
    wide = finished(one, dtype)
    apart = glu(wide, activation=activation), *glu_backward(wide, finished(d_act, dtype), activation=activation)
    for a, b in zip(plain, apart, strict=True):
        close(a, b, dtype)


def test_what_follows_is_quantised_as_after_the_ops_apart():
    rng = np.random.default_rng(0)
    gate_up = product(rng, 37, 384, 64, jnp.bfloat16)
    kernel, apart = (
        fp8.quantise_rows(act)
        for act in (
            fp8.rescale_glu(gate_up, dtype=jnp.bfloat16, implementation="triton"),
            glu(finished(gate_up, jnp.bfloat16)),
        )
    )
    np.testing.assert_allclose(kernel[1], apart[1], rtol=2**-7)  # a bfloat16's neighbour, if at all
    back8, plain8 = (np.asarray(x8, np.float64) * np.asarray(s)[:, None] for x8, s in (kernel, apart))
    assert np.linalg.norm(back8 - plain8) < 2e-3 * np.linalg.norm(plain8)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    m=st.sampled_from([1, 37]),
    d=st.sampled_from([1, 40, 192, 4097]),
    room=st.sampled_from([0, 64]),
    plus_one=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_a_norm_with_scaled_rows_is_the_norm_and_the_scaling(m, d, room, plus_one, dtype):
    rng = np.random.default_rng(d)
    x, weight = normal(rng, m, d, dtype=dtype).at[-1].set(0), 1 + 0.1 * normal(rng, d, dtype=dtype)
    options = dict(eps=1e-5, plus_one=plus_one, room=room)
    y, y8, scale = fp8.rms_norm_rows(x, weight, **options, implementation="triton")
    apart = rms_norm(x, weight, **options, implementation="triton")
    assert y.dtype == dtype and np.array_equal(y, apart)
    expected8, expected = fp8.quantise_rows(y, columns=d)
    assert np.array_equal(scale, expected) and np.array_equal(*(np.asarray(a).view(np.uint8) for a in (y8, expected8)))
    plain = fp8.rms_norm_rows(x, weight, **options, implementation="xla")
    close(y, plain[0], dtype)
    np.testing.assert_allclose(scale, plain[2], rtol=2**-7 if dtype == jnp.bfloat16 else 1e-6)


def test_rows_with_an_infinity_or_a_nan_stay_without_a_value():
    x = jnp.ones((3, 64), jnp.bfloat16).at[0, 3].set(jnp.inf).at[1, 3].set(jnp.nan)
    for implementation in ("xla", "triton"):
        _, y8, scale = fp8.rms_norm_rows(x, jnp.ones(64), eps=1e-5, implementation=implementation)
        back = np.asarray(y8, np.float32) * np.asarray(scale)[:, None]
        assert np.isnan(back[0]).any() and np.isnan(back[1]).any() and np.isfinite(back[2]).all()
        gate_up = Scaled(jnp.concatenate([x, x], axis=1), jnp.ones(3, jnp.float32))
        act = np.asarray(fp8.rescale_glu(gate_up, dtype=jnp.bfloat16, implementation=implementation), np.float32)
        assert np.isinf(act[0, 3]) and np.isnan(act[1, 3]) and np.isfinite(act[:, 4:]).all()


def test_none_picks_the_kernels_on_a_gpu_for_16_bit_values(monkeypatch):
    names, call = [], pallas.call
    monkeypatch.setattr(pallas, "on_gpu", lambda: True)
    monkeypatch.setattr(
        pallas, "call", lambda *a, **o: (names.append(o["name"]), call(*a, **o | {"interpret": True}))[1]
    )
    rng = np.random.default_rng(1)
    for dtype in (jnp.bfloat16, jnp.float32):
        fp8.rescale_glu(product(rng, 3, 80, 0, dtype), dtype=dtype)
        fp8.rescale_glu_backward(product(rng, 3, 80, 0, dtype), product(rng, 3, 40, 0, dtype), dtype=dtype)
    fp8.rms_norm_rows(normal(rng, 3, 40), jnp.ones(40), eps=1e-5)
    assert names == ["fp8_silu_glu", "fp8_silu_glu_backward", "fp8_rms_norm"]


def test_wrong_operands_and_names_are_refused():
    rng = np.random.default_rng(2)
    gate_up, d_act = product(rng, 3, 80, 64, jnp.float32), product(rng, 3, 40, 0, jnp.float32)
    with pytest.raises(ValueError, match="unknown activation 'relu': use one of silu, gelu_tanh, gelu"):
        fp8.rescale_glu(gate_up, dtype=jnp.float32, activation="relu")
    with pytest.raises(ValueError, match="unknown fp8 implementation 'cuda'"):
        fp8.rescale_glu(gate_up, dtype=jnp.float32, implementation="cuda")
    with pytest.raises(ValueError, match="cannot finish"):
        fp8.rescale_glu(gate_up, dtype=jnp.bfloat16)  # not the dtype of h and b
    with pytest.raises(ValueError, match="cannot finish"):
        fp8.rescale_glu(gate_up._replace(scale=jnp.ones(4)), dtype=jnp.float32)
    with pytest.raises(ValueError, match="2F"):
        fp8.rescale_glu(Scaled(jnp.ones((3, 81)), jnp.ones(3)), dtype=jnp.float32)
    with pytest.raises(ValueError, match="of 2 products"):
        fp8.rescale_glu(gate_up, dtype=jnp.float32, ranks=((0, 64),))
    with pytest.raises(ValueError, match="does not fit gate_up"):
        fp8.rescale_glu_backward(gate_up, d_act._replace(sums=jnp.ones((3, 41))), dtype=jnp.float32)
    with pytest.raises(ValueError, match="do not fit"):
        fp8.rms_norm_rows(jnp.ones((3, 8)), jnp.ones(9), eps=1e-5)
