"""8-bit Adam: the kernel against the reference, its reciprocal against float64, and its lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fastft_jax.pallas_kernels.adamw_8bit import BLOCK, Moment, adam_8bit, codes, decode, encode, triton
from fastft_jax.trainers.adam_8bit import scale_by_adam_8bit

GROUPS = 11  # no multiple of a program's blocks


@functools.cache
def compiled(implementation, b1=0.9, b2=0.999):
    return jax.jit(functools.partial(adam_8bit, b1=b1, b2=b2, eps=1e-8, implementation=implementation))


def operands(seed: int, scale: float = 1.0):
    """Gradients of very different sizes, a block of zeros, and moments as earlier steps leave them."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.standard_normal((GROUPS, BLOCK)) * 10.0 ** rng.uniform(-4, 0, (GROUPS, BLOCK)) * scale  # noqa: E731
    grad, m, v = (np.where(rng.random((GROUPS, BLOCK)) < 0.1, 0, draw()).astype(np.float32) for _ in range(3))
    grad[3] = m[3] = v[3] = 0
    return grad, Moment(*encode(m, True)), Moment(*encode(v * v, False)), jnp.float32(0.271), jnp.float32(0.0547)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]))
def test_kernel_quantises_bit_for_bit_as_the_reference(seed, scale):
    grad, m, v, *corrections = operands(seed, scale)
    # Without memory the new moments are g and g^2 exactly, however a compiler contracts the sums.
    results = [compiled(implementation, 0.0, 0.0)(grad, m, v, *corrections) for implementation in ("triton", "xla")]
    for ours, theirs in zip(jax.tree.leaves(results[0][1:]), jax.tree.leaves(results[1][1:]), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert np.array_equal(results[0][1].codes, encode(grad, True)[0])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1.0]))
def test_kernel_follows_the_formula_in_float64(seed, scale):
    grad, m, v, *corrections = operands(seed, scale)
    update, new_m, new_v = compiled("triton")(grad, m, v, *corrections)
    exact_m = 0.9 * np.asarray(decode(*m, True), np.float64) + 0.1 * grad
    exact_v = 0.999 * np.asarray(decode(*v, False), np.float64) + 0.001 * grad.astype(np.float64) ** 2
    exact = exact_m / (np.sqrt(exact_v) / float(corrections[1]) + 1e-8) / float(corrections[0])
    # a sum of two terms of opposite sign loses digits
    size = np.max(np.abs(exact))
    np.testing.assert_allclose(update, exact, rtol=1e-5, atol=1e-6 * size)
    for new, value, signed in ((new_m, exact_m, True), (new_v, exact_v, False)):
        # The map's widest step is 1/64 of the absmax near 1 (unsigned: half that), its nearest entry half of it away.
        off = np.abs(np.asarray(decode(*new, signed), np.float64) - value)
        assert np.all(off <= np.asarray(new.absmax)[:, None] * (0.0071 if signed else 0.0036))
        np.testing.assert_allclose(new.absmax, np.max(np.abs(value), axis=1), rtol=1e-6)


def test_a_bfloat16_gradient_is_upcast():
    grad, *rest = operands(1)
    grad = jnp.asarray(grad, jnp.bfloat16)
    ours, exact = compiled("triton")(grad, *rest), compiled("triton")(grad.astype(jnp.float32), *rest)
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(exact)))


@pytest.mark.parametrize("shape", [(16, 300), (3, 2, 2100), (2, 16, 256)])
def test_the_optimizer_with_the_kernel_equals_the_one_without(shape):
    """Leaves that end within a block, stacks whose layers do, and whole blocks."""
    optimizers = [scale_by_adam_8bit(implementation=i, min_8bit_size=1) for i in ("triton", "xla")]
    params = {"p": jnp.zeros(shape)}
    states = [o.init(params) for o in optimizers]
    steps = [jax.jit(o.update) for o in optimizers]
    for i in range(4):
        grads = {"p": jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)}
        (ours, states[0]), (theirs, states[1]) = (f(grads, s) for f, s in zip(steps, states, strict=True))
        # Moments an ulp apart may take neighbouring codes: then one update in many differs.
        off = np.abs(ours["p"] - theirs["p"])
        assert np.mean(off > 1e-5) < 2e-3
    codes_apart = np.asarray(states[0].m["['p']"].codes, np.int32) - states[1].m["['p']"].codes
    assert np.mean(codes_apart != 0) < 2e-3
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert jax.tree.map(jnp.shape, states[0]) == jax.tree.map(jnp.shape, optimizers[1].init(params))


def test_reciprocal_is_correctly_rounded():
    bits = np.random.default_rng(0).integers(1 << 23, 0x7F800000, 200_000).astype(np.int32)
    a = np.concatenate([bits.view(np.float32), np.float32(2.0) ** np.arange(-126, 128, dtype=np.float32)])
    exact = (1 / a.astype(np.float64)).astype(np.float32)  # float64's own rounding is far from float32's edges
    exact[exact < 2.0**-126] = 0
    assert np.array_equal(jax.jit(codes.reciprocal)(a), exact)
    assert not np.any(codes.reciprocal(jnp.array([0.0, 1e-39, np.inf])))


@pytest.mark.parametrize("signed", [True, False])
def test_search_tree_is_the_sorted_thresholds(signed):
    tree = codes.search_tree(signed)
    in_order = lambda i: [] if i > 255 else [*in_order(2 * i), tree[i], *in_order(2 * i + 1)]  # noqa: E731
    assert np.array_equal(in_order(1), codes.thresholds(signed))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernel_lowers_for_cuda_without_a_gpu(dtype):
    h200 = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h200)
    grad, *rest = jax.eval_shape(lambda: operands(0))
    with jax.sharding.use_abstract_mesh(mesh):
        f = functools.partial(triton.adam_8bit, b1=0.9, b2=0.999, eps=1e-8, interpret=False)
        traced = jax.jit(f).trace(jax.ShapeDtypeStruct(grad.shape, dtype), *rest)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1 and "adam_8bit" in text


def test_wrong_operands_are_named():
    grad, m, v, *corrections = operands(0)
    numbers = dict(b1=0.9, b2=0.999, eps=1e-8)
    with pytest.raises(ValueError, match="uint8 codes"):
        adam_8bit(grad[:5], m, v, *corrections, **numbers)
    with pytest.raises(ValueError, match="uint8 codes"):
        adam_8bit(grad, m, v._replace(codes=v.codes.astype(jnp.int32)), *corrections, **numbers)
    with pytest.raises(ValueError, match="unknown 8-bit Adam implementation"):
        adam_8bit(grad, m, v, *corrections, **numbers, implementation="cuda")
    shapes = jax.ShapeDtypeStruct((2**23, BLOCK), jnp.float32)
    huge = Moment(jax.ShapeDtypeStruct((2**23, BLOCK), jnp.uint8), jax.ShapeDtypeStruct((2**23,), jnp.float32))
    with pytest.raises(ValueError, match="2 GiB"):
        jax.eval_shape(functools.partial(adam_8bit, **numbers, implementation="triton"), shapes, huge, huge, 1.0, 1.0)
