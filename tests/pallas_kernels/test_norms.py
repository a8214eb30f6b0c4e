"""RMSNorm and LayerNorm: both implementations against transformers and torch in float64, and the kernels' lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cuda_lowering import cuda_text, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastft_jax.pallas_kernels.layer_norm import layer_norm
from fastft_jax.pallas_kernels.layer_norm.cases import CASES as LAYER_NORM_CASES
from fastft_jax.pallas_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from fastft_jax.pallas_kernels.rms_norm.cases import CASES as RMS_NORM_CASES

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPS = 1e-5
SIZES = [(70, 48), (70, 1000), (3, 4100)]  # rows in ragged tiles; ragged programs of several tiles; a row a program
BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_float64(norm, inputs: list[np.ndarray], cotangents: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of a torch function, then its gradients."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    outs = norm(*leaves)
    torch.autograd.backward(outs, [torch.tensor(c, dtype=torch.float64) for c in cotangents])
    return [x.detach().numpy() for x in outs] + [x.grad.numpy() for x in leaves]


def torch_rms_norm(x, weight, plus_one):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * (1 + weight if plus_one else weight)


def close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        scale = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * scale)


@BOTH
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("m, d", SIZES)
def test_rms_norm_and_its_gradients_equal_torch_in_float64(m, d, plus_one, implementation):
    x, weight, dy = normal(0, m, d), normal(1, d), normal(2, m, d)
    expected = in_float64(lambda x, w: [torch_rms_norm(x, w, plus_one)], [x, weight], [dy])

    @jax.jit
    def run(x, weight, dy):
        options = dict(eps=EPS, plus_one=plus_one, train_weight=True, implementation=implementation)
        y, vjp = jax.vjp(lambda x, w: rms_norm(x, w, **options), x, weight)
        return y, *vjp(dy)

    close(run(x, weight, dy), expected, 2e-5)


@BOTH
@pytest.mark.parametrize("m, d", SIZES[::2])
def test_add_rms_norm_and_its_gradients_equal_torch_in_float64(m, d, implementation):
    x, delta, weight, d_h, dy = normal(0, m, d), normal(1, m, d), normal(2, d), normal(3, m, d), normal(4, m, d)
    expected = in_float64(lambda x, e, w: [x + e, torch_rms_norm(x + e, w, False)], [x, delta, weight], [d_h, dy])

    @jax.jit
    def run(x, delta, weight, d_h, dy):
        options = dict(eps=EPS, train_weight=True, implementation=implementation)
        outs, vjp = jax.vjp(lambda *args: add_rms_norm(*args, **options), x, delta, weight)
        return *outs, *vjp((d_h, dy))

    close(run(x, delta, weight, d_h, dy), expected, 2e-5)


@BOTH
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("m, d", SIZES[:2])
def test_layer_norm_and_its_gradients_equal_torch_in_float64(m, d, biased, implementation):
    inputs = [normal(0, m, d) + 3, normal(1, d), *([normal(2, d)] * biased)]
    dy = normal(3, m, d)
    torch_norm = lambda x, *affine: [torch.nn.functional.layer_norm(x, (d,), *affine, eps=EPS)]  # noqa: E731
    expected = in_float64(torch_norm, inputs, [dy])

    @jax.jit
    def run(dy, *inputs):
        options = dict(eps=EPS, train_weight=True, implementation=implementation)
        f = lambda x, w, b=None: layer_norm(x, w, b, **options)  # noqa: E731
        y, vjp = jax.vjp(f, *inputs)
        return y, *vjp(dy)

    close(run(dy, *inputs), expected, 4e-5)


@pytest.mark.parametrize("plus_one", [False, True])
def test_bfloat16_is_rounded_where_transformers_rounds(plus_one):
    x, weight = normal(0, 64, 300), normal(1, 300)
    module = (Gemma2RMSNorm if plus_one else LlamaRMSNorm)(300, eps=EPS).to(torch.bfloat16)
    module.weight.data = torch.tensor(weight).to(torch.bfloat16)
    expected = module(torch.tensor(x).to(torch.bfloat16)).detach().float().numpy()
    got = [
        np.asarray(rms_norm(x16, w16, eps=EPS, plus_one=plus_one, implementation=implementation), np.float32)
        for x16, w16 in [(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16))]
        for implementation in ("xla", "triton")
    ]
    for y in got:
        # Another order of summation moves the quotient by a float32 ulp, which tips a rounding once in some thousand.
        assert np.mean(y != expected) < 2e-3
        np.testing.assert_allclose(y, expected, rtol=2**-7)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    d=st.integers(1, 90),
    room=st.integers(0, 20),
    plus_one=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_kernels_equal_the_reference_at_any_size_and_leave_the_room_empty(m, d, room, plus_one, dtype):
    x, delta, dh = (jnp.asarray(normal(i, m, d), dtype) for i in range(3))
    weight, dy = jnp.asarray(normal(3, d), dtype), jnp.asarray(normal(4, m, d + room), dtype)

    def run(implementation):
        options = dict(eps=EPS, room=room, implementation=implementation)
        outs, vjp = jax.vjp(lambda *args: add_rms_norm(*args, plus_one=plus_one, **options), x, delta, weight)
        layer, layer_vjp = jax.vjp(lambda x: layer_norm(x, weight, weight, **options), x)
        return *outs, *vjp((dh, dy)), layer, *layer_vjp(dy)

    kernel, plain = jax.jit(lambda: run("triton"))(), jax.jit(lambda: run("xla"))()
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 2**-6, jnp.float16: 2**-9}[dtype]  # two ulps of the result
    for a, b in zip(kernel, plain, strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=2 * tolerance)
    for y in (kernel[1], kernel[5]):
        assert y.shape == (m, d + room) and not np.any(y[:, d:])


def test_the_weight_has_no_gradient_unless_it_is_trained():
    x, weight = normal(0, 5, 48), normal(1, 48)
    for norm in (lambda w: rms_norm(x, w, eps=EPS), lambda w: layer_norm(x, w, w, eps=EPS)):
        assert not np.any(jax.grad(lambda w, norm=norm: jnp.sum(norm(w)))(weight))


@BOTH
@pytest.mark.parametrize("m, d", SIZES)
def test_the_backward_function_adds_the_residual_cotangent_reads_a_stack_and_ignores_the_room(m, d, implementation):
    x, weight, dy, residual = normal(0, 1, m, d), normal(1, d), normal(2, 1, m, d + 5), normal(3, 1, m, d)
    stack = jnp.stack([x + 1, x, x - 1])
    options = dict(eps=EPS, implementation=implementation)
    y, vjp = jax.vjp(lambda x: rms_norm(x, weight, room=5, **options), x)
    for source, index in ((x, None), (stack, jnp.int32(1))):
        dx, normed = rms_norm_backward(dy, source, weight, d_residual=residual, index=index, **options)
        np.testing.assert_allclose(dx, vjp(jnp.asarray(dy))[0] + residual, atol=1e-5)
        np.testing.assert_allclose(normed, y[..., :d], atol=1e-6)


@pytest.mark.parametrize("case", RMS_NORM_CASES + LAYER_NORM_CASES, ids=lambda case: case.name)
def test_every_case_lowers_for_cuda_to_one_kernel(case):
    assert kernels(cuda_text(case)) == 1


def test_wrong_operands_and_names_are_refused():
    x, weight = jnp.zeros((2, 8)), jnp.zeros(8)
    with pytest.raises(ValueError, match="unknown norm implementation 'cuda'"):
        rms_norm(x, weight, eps=EPS, implementation="cuda")
    with pytest.raises(ValueError, match="unknown norm implementation"):
        layer_norm(x, weight, None, eps=EPS, implementation="pallas")
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(x, weight[:4], eps=EPS)
    with pytest.raises(ValueError, match="do not fit"):
        layer_norm(x, weight, weight[:4], eps=EPS)
    with pytest.raises(ValueError, match="must be alike"):
        add_rms_norm(x, x.astype(jnp.bfloat16), weight, eps=EPS)
    with pytest.raises(ValueError, match="d_residual"):
        rms_norm_backward(x, x, weight, eps=EPS, d_residual=x[:1])
    wide = jax.ShapeDtypeStruct((2, 16384), jnp.float32), jax.ShapeDtypeStruct((16384,), jnp.float32)
    with pytest.raises(ValueError, match="up to 8192 when the weight is trained, got 16384"):
        jax.eval_shape(lambda x, w: rms_norm(x, w, eps=EPS, train_weight=True, implementation="triton"), *wide)
    jax.eval_shape(lambda x, w: rms_norm(x, w, eps=EPS, implementation="triton"), *wide)
