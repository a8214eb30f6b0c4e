"""How a layer's activations are kept for the backward pass: written by the forward loop, read by the backward one.

A layer passes each activation that may be kept through `keep(name, value)`. In a plain forward pass that is `value`. In
the forward loop of training it is stored at the layer's index of a buffer. In the backward loop, which traces the same
layer again, `keep` returns what was stored, with the gradient of `value`: computing `value` is then dead code. A name
that the policy does not list is `value` in both: recomputed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from fastft_jax.models.remat import LAYER_INPUT
from fastft_jax.pallas_kernels.uninitialised import uninitialised


class Slot(NamedTuple):
    """A value, and where it is stored if it is: a kernel that reads `stack[index]` itself saves a copy of the slice."""

    value: Array
    stack: Array | None = None
    index: Int[Array, ""] | None = None

    def read(self) -> Array:
        """What was stored, with the gradient of the value."""
        return self.value if self.stack is None else _instead(self.value, _get(self.stack, self.index))


class Keep:
    """Keeps nothing: what a forward pass without gradients uses, and the base of the others."""

    def __init__(self, table: Mapping[str, str] | None = None):
        self._table, self._count = table or {}, {}

    def __call__(self, name: str, value: Array) -> Array:
        how = self._table.get(name, "recompute")
        return value if how == "recompute" else self._kept(self._key(name), how, value)

    def keeps(self, name: str) -> bool:
        """Whether values of that name are kept, wherever; if not, they are computed again."""
        return self._table.get(name, "recompute") != "recompute"

    def slot(self, name: str, value: Array) -> Slot:
        """As a call, for the one consumer that can read a stack in place; it must give the gradient to `value`."""
        how = self._table.get(name, "recompute")
        if how != "save":
            return Slot(self(name, value))
        return self._slot(self._key(name), value)

    def shared_slot(self, name: str, value: Array) -> Slot:
        """As `slot`, where others want the value, too: only the backward pass reads it from the stack."""
        return Slot(self(name, value))

    def input(self, x: Array) -> Slot:
        """The layer's input, which the loop keeps."""
        return Slot(x)

    def _key(self, name: str) -> str:
        """A name may come several times in a layer; the order is the same at every trace."""
        self._count[name] = self._count.get(name, -1) + 1
        return f"{name}/{self._count[name]}"

    def _kept(self, key: str, how: str, value: Array) -> Array:
        return value

    def _slot(self, key: str, value: Array) -> Slot:
        return Slot(self._kept(key, "save", value))


class Buffers(NamedTuple):
    """What all layers keep, [L, ...] by key."""

    device: dict[str, Array]
    host: dict[str, Array]


class Probe(Keep):
    """Notes what a layer would keep."""

    def __init__(self, table: Mapping[str, str]):
        super().__init__(table)
        self.device: dict[str, jax.ShapeDtypeStruct] = {}
        self.host: dict[str, jax.ShapeDtypeStruct] = {}

    def _kept(self, key, how, value):
        place = self.host if how == "offload" else self.device
        place[key] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return value

    def buffers(self, count: int, number: int = 0) -> Buffers:
        """Room for `count` layers, not cleared: every element is written before it is read.

        The host's is asked for as a constant, which XLA does not write: `number` and those that follow. Of equal ones
        it would make one buffer and copies of it, on the host: 239 of 654 ms a step of GPT-OSS 20B, layers in pairs.
        """
        return Buffers(
            {key: uninitialised((count, *s.shape), s.dtype) for key, s in self.device.items()},
            {
                key: to_host(jnp.full((count, *s.shape), number + n, s.dtype))
                for n, (key, s) in enumerate(self.host.items())
            },
        )


class Writer(Keep):
    """Stores what a layer keeps at its index; `buffers` has the result."""

    def __init__(self, table: Mapping[str, str], buffers: Buffers, index: Int[Array, ""]):
        super().__init__(table)
        self.buffers = Buffers(dict(buffers.device), dict(buffers.host))
        self._index = index

    def _kept(self, key, how, value):
        if how == "offload":
            self.buffers.host[key] = _put(self.buffers.host[key], to_host(value), self._index)
        else:
            # Without the barrier XLA computes a product that is stored and read twice: once into its place.
            stored = lax.optimization_barrier(value)
            stored = _put(self.buffers.device[key], stored, self._index)
            value, self.buffers.device[key] = lax.optimization_barrier((value, stored))
        return value

    def _slot(self, key, value):
        # Nobody but the buffer wants the value, so the GEMM that makes it writes it there.
        self.buffers.device[key] = _put(self.buffers.device[key], value, self._index)
        return Slot(value, self.buffers.device[key], self._index)


class Reader(Keep):
    """Gives back what the forward loop kept of the layer; what lay on the host comes in `fetched`."""

    def __init__(self, table: Mapping[str, str], buffers: Buffers, fetched: dict[str, Array], index: Int[Array, ""]):
        super().__init__(table)
        self._buffers, self._fetched, self._index = buffers, fetched, index
        self._count[LAYER_INPUT] = 0  # the loop reads its own by `stored`

    def stored(self, key: str) -> Array:
        return self._fetched[key] if key in self._fetched else _get(self._buffers.device[key], self._index)

    def shared_slot(self, name, value):
        if self._table.get(name, "recompute") != "save":
            return Slot(self(name, value))
        key = self._key(name)
        return Slot(self._kept(key, "save", value), self._buffers.device[key], self._index)

    def input(self, x):
        key = f"{LAYER_INPUT}/{self._count[LAYER_INPUT]}"
        return Slot(x, self._buffers.device[key], self._index) if key in self._buffers.device else Slot(x)

    def _kept(self, key, how, value):
        return _instead(value, self.stored(key))

    def _slot(self, key, value):
        return Slot(value, self._buffers.device[key], self._index)


def fetch(buffers: Buffers, index: Int[Array, ""] | int) -> dict[str, Array]:
    """A layer's values from the host. `index` must be linear in the loop's counter, or it is no asynchronous copy."""
    return {key: jax.device_put(_get(b, index), jax.memory.Space.Device) for key, b in buffers.host.items()}


def to_host(x: Array) -> Array:
    return jax.device_put(x, jax.memory.Space.Host)


@jax.custom_vjp
def _instead(value: Array, stored: Array) -> Array:
    return stored


_instead.defvjp(lambda value, stored: (stored, None), lambda _, ct: (ct, None))


def _put(buffer: Array, value: Array, index: Any) -> Array:
    start = (index, *[0] * value.ndim)
    return lax.dynamic_update_slice(buffer, value[None], start, allow_negative_indices=False)


def _get(buffer: Array, index: Any) -> Array:
    start = (index, *[0] * (buffer.ndim - 1))
    return lax.dynamic_slice(buffer, start, (1, *buffer.shape[1:]), allow_negative_indices=False)[0]
