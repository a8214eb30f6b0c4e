"""What every kernel is checked and timed on: one problem, its reference, and the fewest bytes and FLOPs it costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Case:
    """A kernel at one size.

    `run(*args, interpret=...)` is the kernel itself: interpret=None interprets off a GPU, False compiles for a GPU that
    need not be there. `reference(*args)` is the same function in plain jnp. `args` are the shapes of the operands
    (jax.ShapeDtypeStruct), from which benches and tests draw values with `draw` (a seed in, operands out).
    """

    name: str  # "rms_norm/forward/8192x4096": op, direction, size
    run: Callable[..., Any]
    reference: Callable[..., Any]
    args: tuple[jax.ShapeDtypeStruct, ...]
    bytes: int  # read once + written once
    flops: int = 0  # matrix-unit operations; 0 where memory is the bound
    draw: Callable[[int], tuple[Any, ...]] | None = None  # None: normal values (uniform bytes for uint8)
    min_compute_capability: tuple[int, int] = (8, 0)
    spills: int = 0  # bytes a thread that ptxas may spill, where tiles that spill nothing were measured to be slower
