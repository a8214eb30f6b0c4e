"""The loop over layers and its derivative: values, gradients, and what is computed twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.models.residuals import Keep
from fastft_jax.models.stack import run_layers

LAYERS, WIDTH = 3, 8


def arrays():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return normal(2, 4, WIDTH), {"w": normal(LAYERS, WIDTH, WIDTH)}, {"scale": normal(LAYERS, WIDTH)}


def layer(x, trainable, frozen, index, keep):
    q = keep("q", jnp.tanh(x @ trainable["w"]))
    gate_up = keep.slot("gate_up", q * frozen["scale"][index])
    return x + gate_up.read() * jnp.sin(q), jnp.mean(q, axis=0)


def written_out(x, trainable, frozen):
    total = 0
    for i in range(LAYERS):
        x, addend = layer(x, {"w": trainable["w"][i]}, frozen, i, Keep())
        total += addend
    return x, total


@pytest.mark.parametrize(
    "policy",
    [
        *("none", "full", "offload"),
        (("gate_up", "save"), ("q", "offload")),
        (("layer_input", "recompute"), ("q", "save")),
        (("gate_up", 0.4), ("layer_input", "offload"), ("q", 0.7)),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_layers_written_out(policy):
    x, trainable, frozen = arrays()
    loss = lambda f: jax.jit(jax.value_and_grad(lambda x, t: squares(*f(x, t)), (0, 1)))  # noqa: E731
    ours = loss(lambda x, t: run_layers(layer, LAYERS, policy, x, t, frozen))(x, trainable)
    expected = loss(lambda x, t: written_out(x, t, frozen))(x, trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)
    plain = jax.jit(lambda x: run_layers(layer, LAYERS, policy, x, trainable, frozen))(x)
    for a, b in zip(plain, written_out(x, trainable, frozen), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def squares(x, total):
    return jnp.sum(x**2) + jnp.sum(total**3)


@pytest.mark.parametrize(
    "policy, calls_of_all_layers",
    [("none", 3), ("full", 6), ((("q", "save"),), 3), ((("q", "offload"),), 3), ((("q", 0.4),), 5), ((("q", 0.6),), 4)],
)
def test_what_is_kept_is_not_computed_again(policy, calls_of_all_layers):
    """The kept value comes from a callback, which counts; nothing but the value itself needs it."""
    x, trainable, frozen = arrays()
    calls = []

    def counted(value):
        calls.append(1)
        return np.asarray(value)

    @jax.custom_vjp
    def costly(value):
        return jax.pure_callback(counted, jax.ShapeDtypeStruct(value.shape, value.dtype), value)

    costly.defvjp(lambda value: (costly(value), None), lambda _, ct: (ct,))

    def counting(x, leaves, frozen, index, keep):
        return x + jnp.sin(keep("q", costly(x @ leaves["w"]))), None

    gradient = jax.jit(jax.grad(lambda t: jnp.sum(run_layers(counting, LAYERS, policy, x, t, frozen)[0])))
    jax.block_until_ready(gradient(trainable))
    assert len(calls) == calls_of_all_layers
