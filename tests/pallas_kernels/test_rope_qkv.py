"""Rotary embedding of a fused projection: against transformers, against autodiff, and the kernels' lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cuda_lowering import cuda_text, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fastft_jax.pallas_kernels.rope import apply_rope, rope_qkv
from fastft_jax.pallas_kernels.rope.cases import CASES

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPS = 1e-6
BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])
# heads, key heads, width of a head, half of its rotated part: counts and widths that are not powers of two
WHOLE, PARTIAL = (3, 1, 24, 12), (6, 3, 20, 4)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def problem(n, k, h, half, b=2, t=3):
    """qkv, cos, sin, the norm weights and cotangents of q, k, v."""
    angles = normal(1, b, t, half)
    cotangents = tuple(normal(4 + i, b, t, heads, h) for i, heads in enumerate((n, k, k)))
    return normal(0, b, t, (n + 2 * k) * h), np.cos(angles), np.sin(angles), normal(2, h), normal(3, h), cotangents


def in_transformers(qkv, cos, sin, q_norm, k_norm, cotangents, n, k, norm):
    """q, k, v and the gradient of qkv, in float64."""
    as_torch = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    leaf = as_torch(qkv).requires_grad_()
    h = cotangents[0].shape[-1]
    q, keys, v = leaf.view(*qkv.shape[:2], -1, h).split([n, k, k], dim=2)
    if norm is not None:
        modules = [norm(h, eps=EPS).double() for _ in range(2)]
        for module, weight in zip(modules, (q_norm, k_norm), strict=True):
            module.weight.data = as_torch(weight)
        q, keys = (_in_float64(module, x) for module, x in zip(modules, (q, keys), strict=True))
    twice = lambda x: torch.cat([as_torch(x)] * 2, dim=-1)  # noqa: E731
    q, keys = apply_rotary_pos_emb(q, keys, twice(cos), twice(sin), unsqueeze_dim=2)
    torch.autograd.backward([q, keys, v], [as_torch(c) for c in cotangents])
    return [x.detach().numpy() for x in (q, keys, v, leaf.grad)]


def _in_float64(module, x):
    """These modules compute in float32 whatever they are given: repeat their equation in float64."""
    scale = 1 + module.weight if isinstance(module, Gemma3RMSNorm) else module.weight
    exact = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * scale
    torch.testing.assert_close(module(x).double(), exact, rtol=1e-5, atol=1e-5)
    return exact


@BOTH
@pytest.mark.parametrize(
    "layout, norm", [(WHOLE, None), (PARTIAL, None), (PARTIAL, Qwen3RMSNorm), (WHOLE, Gemma3RMSNorm)]
)
def test_values_and_gradients_equal_transformers(layout, norm, implementation):
    n, k, h, half = layout
    qkv, cos, sin, q_norm, k_norm, cotangents = problem(n, k, h, half)
    expected = in_transformers(qkv, cos, sin, q_norm, k_norm, cotangents, n, k, norm)

    @jax.jit
    def run(qkv, cotangents):
        options = dict(num_heads=n, num_kv_heads=k, head_dim=h, implementation=implementation)
        if norm is not None:
            options |= dict(q_norm=q_norm, k_norm=k_norm, eps=EPS, plus_one=norm is Gemma3RMSNorm)
        outs, vjp = jax.vjp(lambda qkv: rope_qkv(qkv, jnp.asarray(cos), jnp.asarray(sin), **options), qkv)
        return *outs, *vjp(cotangents)

    for a, b in zip(run(qkv, cotangents), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@BOTH
@pytest.mark.parametrize("layout, normed", [(WHOLE, False), (PARTIAL, True)])
def test_a_slice_of_a_stack_is_read_in_place_of_the_array(layout, normed, implementation):
    """The last slice included; the array itself is only what the gradient belongs to."""
    n, k, h, half = layout
    qkv, cos, sin, q_norm, k_norm, cotangents = problem(n, k, h, half)
    options = dict(num_heads=n, num_kv_heads=k, head_dim=h, implementation=implementation)
    if normed:
        options |= dict(q_norm=q_norm, k_norm=k_norm, eps=EPS)

    @jax.jit
    def run(qkv, stack=None, index=None):
        rope = lambda qkv: rope_qkv(qkv, jnp.asarray(cos), jnp.asarray(sin), stack=stack, index=index, **options)  # noqa: E731
        outs, vjp = jax.vjp(rope, qkv)
        return *outs, *vjp(cotangents)

    wanted = run(qkv)
    stack = np.stack([normal(9, *qkv.shape), normal(10, *qkv.shape), qkv])
    for shift in (0, 1):
        ours = run(np.zeros_like(qkv), np.roll(stack, -shift, 0), jnp.int32(2 - shift))
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # compiled twice: a float32 ulp or two


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    heads=st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda pair: (pair[0] * pair[1], pair[1])),
    h=st.integers(1, 20).map(lambda half: 2 * half),
    rotated=st.floats(0.1, 1.0),
    normed=st.booleans(),
)
def test_kernel_equals_the_reference_in_bfloat16_at_any_size(heads, h, rotated, normed):
    (n, k), half = heads, max(1, int(h * rotated) // 2)
    qkv, cos, sin, q_norm, k_norm, cotangents = problem(n, k, h, half)
    qkv, q_norm, k_norm, cotangents = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16), (qkv, q_norm, k_norm, cotangents)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, qkv, cotangents):
        norms = dict(q_norm=q_norm, k_norm=k_norm, eps=EPS) if normed else {}
        options = dict(num_heads=n, num_kv_heads=k, head_dim=h, implementation=implementation) | norms
        outs, vjp = jax.vjp(lambda qkv: rope_qkv(qkv, jnp.asarray(cos), jnp.asarray(sin), **options), qkv)
        return *outs, *vjp(cotangents)

    for a, b in zip(run("triton", qkv, cotangents), run("xla", qkv, cotangents), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16 and a.shape == b.shape
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        # The norms' two roundings may tip either way before a rotation that cancels: errors scale with the largest.
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-8 * max(1.0, np.abs(b).max()))


def test_the_fused_op_is_apply_rope_of_each_part():
    qkv, cos, sin, *_ = problem(*WHOLE)
    q, k, v = rope_qkv(qkv, cos, sin, num_heads=3, num_kv_heads=1, head_dim=24, implementation="triton")
    parts = np.split(qkv.reshape(2, 3, 5, 24), (3, 4), axis=2)
    np.testing.assert_allclose(q, apply_rope(parts[0], cos, sin), atol=1e-6)
    np.testing.assert_allclose(k, apply_rope(parts[1], cos, sin), atol=1e-6)
    assert np.array_equal(v, parts[2])


def test_norm_weights_have_a_gradient_only_where_they_are_trained():
    qkv, cos, sin, q_norm, k_norm, _ = problem(*WHOLE)
    layout = dict(num_heads=3, num_kv_heads=1, head_dim=24, eps=EPS)

    def grads(**options):
        weigh = lambda q, k, v: jnp.sum(q * q * q) + jnp.sum(k * k * k)  # noqa: E731
        f = lambda a, b: weigh(*rope_qkv(qkv, cos, sin, q_norm=a, k_norm=b, **layout, **options))  # noqa: E731
        return jax.grad(f, (0, 1))(q_norm, k_norm)

    assert not any(np.any(g) for g in grads())
    for a, b in zip(grads(train_weight=True), (q_norm, k_norm), strict=True):
        assert a.shape == b.shape and np.all(np.isfinite(a)) and np.all(a != 0)


@pytest.mark.parametrize("normed", [False, True])
def test_without_norms_only_the_tables_are_kept_for_the_gradient(normed):
    qkv, cos, sin, q_norm, k_norm, _ = (jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in problem(*WHOLE))
    options = dict(num_heads=3, num_kv_heads=1, head_dim=24)
    if normed:
        options |= dict(q_norm=q_norm, k_norm=k_norm, eps=EPS)
    _, vjp = jax.vjp(lambda qkv: rope_qkv(qkv, cos, sin, **options), qkv)
    kept = sum(leaf.size for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "size"))
    assert kept == cos.size + sin.size + (qkv.size + 2 * 24 if normed else 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_lowers_for_cuda_to_one_kernel(case):
    assert kernels(cuda_text(case)) == 1


def test_wrong_operands_and_names_are_refused():
    qkv, cos, sin, q_norm, k_norm, _ = problem(*WHOLE)
    layout = dict(num_heads=3, num_kv_heads=1, head_dim=24)
    with pytest.raises(ValueError, match="unknown rope implementation 'cuda'"):
        rope_qkv(qkv, cos, sin, **layout, implementation="cuda")
    with pytest.raises(ValueError, match="do not fit qkv"):
        rope_qkv(qkv[..., 1:], cos, sin, **layout)
    with pytest.raises(ValueError, match="cos and sin"):
        rope_qkv(qkv, cos[:1], sin[:1], **layout)
    with pytest.raises(ValueError, match="go together"):
        rope_qkv(qkv, cos, sin, **layout, q_norm=q_norm, eps=EPS)
    with pytest.raises(ValueError, match="need eps"):
        rope_qkv(qkv, cos, sin, **layout, q_norm=q_norm, k_norm=k_norm)
    with pytest.raises(ValueError, match="no gradient of the norm weights"):
        rope_qkv(qkv, cos, sin, **layout, train_weight=True, implementation="triton")
