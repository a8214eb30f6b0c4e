"""Gated linear units: both implementations against torch, the kernel's erf, and the kernels' lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cuda_lowering import cuda_text, kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from fastft_jax.pallas_kernels.glu import glu, glu_backward
from fastft_jax.pallas_kernels.glu.activations import normal as normal_law
from fastft_jax.pallas_kernels.glu.cases import CASES

BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])
IN_TRANSFORMERS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}
NAMES = [*IN_TRANSFORMERS, "clamped_silu"]
ACTIVATIONS = pytest.mark.parametrize("activation", NAMES)


def normal(seed: int, *shape: int) -> np.ndarray:
    return 3 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)  # well into both tails


def in_torch(activation, gate_up, rounded=lambda x: x):
    """act(gate) * up; the clamped unit is transformers' own, of GPT-OSS, which has gate and up in turns."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "clamped_silu":
        with torch.device("meta"):
            config = GptOssConfig(num_local_experts=1, hidden_size=1, intermediate_size=1)
            experts = GptOssExperts(config)
        if rounded(gate) is gate:
            return experts._apply_gate(torch.stack([gate, up], -1).flatten(-2))
        one = experts._apply_gate(torch.stack([gate.double(), torch.zeros_like(gate.double())], -1).flatten(-2))
        return rounded(one) * (up.clamp(-experts.limit, experts.limit) + 1)
    act = ACT2FN[IN_TRANSFORMERS[activation]]
    return act(gate) * up if rounded(gate) is gate else rounded(act(gate.double())) * up


@BOTH
@ACTIVATIONS
def test_values_and_gradients_equal_torch_in_float64(activation, implementation):
    gate_up, d_act = 2 * normal(0, 2, 3, 2 * 50), normal(1, 2, 3, 50)
    gate_up[0, 0, :4] = gate_up[0, 0, 50:54] = 7.0, -7.0, 7.1, -7.1  # about the clamp
    leaf = torch.tensor(gate_up, dtype=torch.float64, requires_grad=True)
    expected = in_torch(activation, leaf)
    expected.backward(torch.tensor(d_act, dtype=torch.float64))
    y, vjp = jax.vjp(lambda x: glu(x, activation=activation, implementation=implementation), jnp.asarray(gate_up))
    for a, b in zip((y, *vjp(jnp.asarray(d_act))), (expected.detach(), leaf.grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@BOTH
@ACTIVATIONS
def test_bfloat16_is_rounded_where_transformers_rounds(activation, implementation):
    gate_up = torch.tensor(normal(0, 64, 2 * 100) / 3).to(torch.bfloat16)
    # its kernels round a float32 value
    expected = in_torch(activation, gate_up, lambda x: x.to(torch.bfloat16, copy=True)).double().numpy()
    y = glu(jnp.asarray(gate_up.float().numpy(), jnp.bfloat16), activation=activation, implementation=implementation)
    y = np.asarray(y, np.float64)
    # An activation on the edge between two bfloat16s may fall either way, then the product differs by an ulp or two.
    assert np.mean(y != expected) < 2e-3
    np.testing.assert_allclose(y, expected, rtol=2**-6, atol=1e-30)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 5),
    f=st.integers(1, 70) | st.integers(2040, 2060),  # below a block, and about one
    room=st.integers(0, 20),
    activation=st.sampled_from(sorted(IN_TRANSFORMERS)),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_kernel_equals_the_reference_at_any_size_and_leaves_the_room_empty(m, f, room, activation, dtype):
    gate_up, d_act = jnp.asarray(normal(0, m, 2 * f), dtype), jnp.asarray(normal(1, m, f + room), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, gate_up, d_act):
        options = dict(activation=activation, room=room, implementation=implementation)
        y, vjp = jax.vjp(lambda x: glu(x, **options), gate_up)
        return y, *vjp(d_act), *glu_backward(gate_up, d_act, **options)

    kernel, plain = run("triton", gate_up, d_act), run("xla", gate_up, d_act)
    tolerance = {jnp.float32: 3e-6, jnp.bfloat16: 2**-6, jnp.float16: 2**-9}[dtype]  # two ulps of the result
    for a, b in zip(kernel, plain, strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)
    y, grad, same_grad, same_y = kernel
    assert np.array_equal(y, same_y) and np.array_equal(grad, same_grad)
    assert y.shape == (m, f + room) and not np.any(y[:, f:])


@BOTH
@pytest.mark.parametrize("activation", ["silu", "clamped_silu"])
def test_a_weight_of_each_row_and_its_gradient_equal_torch_in_float64(activation, implementation):
    """Rows of more than one program; the sums of 2,050 products of normal numbers are float32's."""
    gate_up, d_act, weight = normal(0, 3, 2 * 2050), normal(1, 3, 2050), np.abs(normal(2, 3))
    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (gate_up, weight)]
    expected = in_torch(activation, leaves[0]) * leaves[1][:, None]
    expected.backward(torch.tensor(d_act, dtype=torch.float64))
    options = dict(activation=activation, implementation=implementation)

    @jax.jit
    def run(gate_up, weight, d_act):
        y, vjp = jax.vjp(lambda x, w: glu(x, row_weight=w, **options), gate_up, weight)
        stacked = jnp.stack([jnp.zeros_like(gate_up), gate_up])  # read where it lies, as the training loop does
        return y, *vjp(d_act), *glu_backward(stacked, d_act, index=jnp.int32(1), row_weight=weight, **options)

    y, d_gate_up, d_weight, *again = run(gate_up, weight, d_act)
    for a, b in zip((y, d_gate_up, d_weight), (expected.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    for a, b in zip(again, (d_gate_up, y, d_weight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


def test_the_normal_law_of_the_kernel_is_accurate_in_float32():
    x = np.concatenate([np.linspace(-14, 14, 200_001), [0.0, 1.25, -1.25, 1e30, -1e30]]).astype(np.float32)
    cdf, pdf = (np.asarray(y, np.float64) for y in jax.jit(normal_law)(x))
    scaled = torch.tensor(x, dtype=torch.float64) / 2**0.5
    exact, erf = torch.special.erfc(-scaled).numpy() / 2, torch.special.erf(scaled).numpy()
    assert np.abs(2 * cdf - 1 - erf).max() < 2e-7
    tail = (x > -8) & (x < 0)
    assert np.abs(cdf[tail] / exact[tail] - 1).max() < 5e-6  # where 1 - erf has no digit left
    np.testing.assert_allclose(
        pdf, np.exp(-(x.astype(np.float64) ** 2) / 2) / (2 * np.pi) ** 0.5, rtol=5e-6, atol=1e-37
    )


@BOTH
@pytest.mark.parametrize("activation", IN_TRANSFORMERS)
def test_extreme_gates_give_finite_values_and_gradients(activation, implementation):
    gate_up = jnp.asarray([[-1e6, -1e4, -90.0, 0.0, 90.0, 1e4, *[1.0] * 6]], jnp.float32)
    grad, y = glu_backward(gate_up, jnp.ones((1, 6)), activation=activation, implementation=implementation)
    np.testing.assert_allclose(y, [[0, 0, 0, 0, 90, 1e4]], atol=1e-30)
    np.testing.assert_allclose(grad, [[0, 0, 0, 0.5, 1, 1, 0, 0, 0, 0, 90, 1e4]], atol=1e-30)


@BOTH
def test_clamped_gates_and_ups_are_finite_and_have_no_gradient(implementation):
    gate_up = jnp.asarray([[-1e6, 1e4, 0.0, 1.0, 1.0, 1.0, 1e4, -1e4]], jnp.float32)
    grad, y = glu_backward(gate_up, jnp.ones((1, 4)), activation="clamped_silu", implementation=implementation)
    seven, one = 7 / (1 + np.exp(-1.702 * 7)), 1 / (1 + np.exp(-1.702))
    slope = one * (1 + 1.702 * (1 - one))
    np.testing.assert_allclose(y, [[0, 2 * seven, 0, -6 * one]], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(grad, [[0, 0, 4, -6 * slope, 0, seven, 0, 0]], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_lowers_for_cuda_to_one_kernel(case):
    assert kernels(cuda_text(case)) == 1


def test_wrong_operands_and_names_are_refused():
    gate_up = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match="unknown GLU implementation 'cuda'"):
        glu(gate_up, implementation="cuda")
    with pytest.raises(ValueError, match="unknown activation 'relu': use one of silu, gelu_tanh, gelu"):
        glu(gate_up, activation="relu")
    with pytest.raises(ValueError, match="2F"):
        glu(gate_up[:, :7])
    with pytest.raises(ValueError, match="does not fit gate_up"):
        glu_backward(gate_up, gate_up[:, :3])
