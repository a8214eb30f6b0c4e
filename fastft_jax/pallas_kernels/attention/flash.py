"""The derivative shared by all flash kernels, with its two residuals in the caller's hands.

A `custom_vjp` whose forward rule ran the kernel would hide the output and the log-sum-exp from whoever decides what a
layer keeps. So the forward kernel runs outside, its results pass through `keep`, and only then the gradient is tied on.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

Keep = Callable[[str, Array], Array]


def plain(name: str, value: Array) -> Array:
    """A `keep` that keeps nothing."""
    return value


def flash(
    forward: Callable[..., tuple[Array, Array]], backward: Callable[..., tuple], operands: tuple, keep: Keep
) -> Float[Array, "B T N H"]:
    """`out` of `forward(*operands) -> out, lse`, with `backward(*operands, out, lse, d_out)` for its gradient.

    backward returns one cotangent an operand, None for those without. out and lse go through keep("attn_out", ..) and
    keep("attn_lse", ..), which may return what an earlier pass kept: the forward kernel is then dead code.
    """
    out, lse = forward(*lax.stop_gradient(operands))
    return _tie(backward, operands, keep("attn_out", out), keep("attn_lse", lse))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tie(backward, operands, out, lse):
    return out


def _tie_forward(backward, operands, out, lse):
    return out, (operands, out, lse)


def _tie_backward(backward, residuals: Any, d_out):
    operands, out, lse = residuals
    return backward(*operands, out, lse, d_out), None, None


_tie.defvjp(_tie_forward, _tie_backward)
