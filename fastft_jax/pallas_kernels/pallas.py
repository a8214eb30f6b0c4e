"""The one owner of Pallas incantations: which backend compiles a kernel, how, and when it is interpreted.

Kernels are written once for Pallas's Triton backend (Ampere, Ada and Hopper from one source). That backend is
deprecated in favour of Mosaic GPU, so a kernel takes `load`, `store` and `call` from here and nothing from Pallas's
backend modules.
"""

import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as backend

FP8_CAPABILITY = (8, 9)  # the first cards that convert to e4m3 and multiply in it: Ada; Hopper is 9.0

BlockSpec = pl.BlockSpec
program_id = pl.program_id
ds = pl.ds
cdiv = pl.cdiv
load = backend.load
store = backend.store
inline_asm = backend.elementwise_inline_asm  # neither can be interpreted: keep a branch without
barrier = backend.debug_barrier


_only_references = jax.make_user_context(False)  # jax traces a function again where it differs
_imagined = jax.make_user_context(None)


def on_gpu() -> bool:
    """Whether kernels are the default: JAX's default device is a GPU, and nothing asked for `references`."""
    if _imagined.value is not None:
        return _imagined.value
    return jax.default_backend() == "gpu" and not _only_references.value


@functools.cache
def current_device() -> tuple[str, tuple[int, int] | None]:
    """(platform, compute capability) of JAX's default device; starts the backend, so never called at import."""
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(capability, str) or "." not in capability:
        return device.platform, None
    major, minor = capability.split(".")[:2]
    return "gpu", (int(major), int(minor))


def references() -> AbstractContextManager[None]:
    """While it lasts, every op that is free to choose takes its plain XLA reference, on a GPU, too."""
    return _only_references(True)


def imagine(gpu: bool) -> AbstractContextManager[None]:
    """While it lasts, ops choose as if there were a GPU, or none: to say what would run on a card, not to run it."""
    return _imagined(gpu)


def only_references() -> bool:
    """Whether `references` is in force."""
    return _only_references.value


@functools.cache
def _prepare_lowering() -> None:
    """Once a process: no warning at every lowering that this backend will go (the move is known and contained in this
    file), and no search for a module at every Triton operation."""
    warnings.filterwarnings("ignore", message=".*Pallas Triton backend is deprecated.*")
    # MLIR's Python bindings look for the module of an operation's dialect until there is one. jaxlib has none for
    # Triton: 14,000 failed imports, half of the time that lowering a training step takes.
    name = "jaxlib.mlir.dialects.tt"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)


def call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    input_output_aliases: Mapping[int, int] | None = None,
    interpret: bool | None = None,
) -> Callable[..., Any]:
    """Make a callable of a kernel of refs; `name` is what a profile and the compiled HLO call it.

    Blocks that stick out of an array are NOT masked on a GPU: kernels mask every load and store themselves. Only loaded
    shapes must be powers of two. `interpret=None` interprets on anything but a GPU; `False` is for compiling for a
    GPU on a machine that has none. `input_output_aliases` maps an input's index to the output written in its place.
    Gradients: wrap the op in `jax.custom_vjp`, a gridded call has no derivative.
    """
    _prepare_lowering()
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=dict(input_output_aliases or {}),
        interpret=not on_gpu() if interpret is None else interpret,
        compiler_params=backend.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )
