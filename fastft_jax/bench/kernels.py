"""Times every kernel on its cases: against the same function as XLA compiles it, and against what the card allows."""

import functools
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fastft_jax.bench.profile import Speeds
from fastft_jax.bench.trace import busy, profiled, read_events
from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.pallas import current_device

PACKAGES = (
    "rms_norm",
    "layer_norm",
    "rope",
    "glu",
    "nf4",
    "attention",
    "linear_cross_entropy",
    "quantised_matmul",
    "grouped_matmul",
    "fp8",
    "adamw_8bit",
)
CALLS = 20
COPIED = 2**30  # bytes of the copy that tells how fast memory is


def cases(filters: Iterable[str] = ()) -> Iterator[Case]:
    """The cases of every op package that has a `cases` module, whose names contain one of `filters` (all, if none)."""
    filters = tuple(filters)
    for package in PACKAGES:
        name = f"fastft_jax.pallas_kernels.{package}.cases"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and name.startswith(error.name):
                continue  # the package has no cases (or is not there)
            raise
        yield from (case for case in module.CASES if not filters or any(part in case.name for part in filters))


def measure(case: Case, speeds: Speeds, calls: int = CALLS) -> dict[str, Any]:
    """A record of one case: microseconds of kernel and reference, their difference, what share of the bound each is.

    A function that fails (no room for the reference, a kernel that this card cannot run) has "error" instead.
    """
    record: dict[str, Any] = {"case": case.name, "bytes": case.bytes, "flops": case.flops}
    limits = [w / s for w, s in ((case.flops, speeds.peak), (case.bytes, speeds.copy)) if w and s]
    bound = max(limits, default=None)
    record["bound_microseconds"] = bound and round(1e6 * bound, 2)
    capability = current_device()[1]
    if capability is not None and capability < case.min_compute_capability:
        needs = "{}.{}".format(*case.min_compute_capability)
        return record | {"kernel": {"error": f"needs compute capability {needs}"}, "reference": {}}
    operands, results = draw(case, 0), {}
    for name, function in (("kernel", functools.partial(case.run, interpret=None)), ("reference", case.reference)):
        try:
            # outputs of the kernel stay for the comparison; a fresh jit, so that no setting of an earlier one is kept
            results[name], seconds, spread = timed(jax.jit(lambda *a, f=function: f(*a)), operands, calls)
        except Exception as error:  # noqa: BLE001 - one case must not end the others
            record[name] = {"error": str(error).splitlines()[0][:200] if str(error) else type(error).__name__}
            continue
        record[name] = {"microseconds": round(1e6 * seconds, 2), "range": [round(1e6 * s, 2) for s in spread]}
        record[name]["share_of_bound"] = bound and round(bound / seconds, 3)
    if len(results) == 2:
        record["difference"] = float(f"{relative_difference(results['kernel'], results['reference']):.3g}")
    return record


def timed(
    function: Callable[..., Any], operands: tuple[Any, ...], calls: int
) -> tuple[Any, float, tuple[float, float]]:
    """(result, median seconds of a call, smallest and largest of three rounds).

    On a GPU the seconds are those in which the device worked, from the profiler, so that launching costs nothing; on a
    CPU the wall clock's.
    """
    result = jax.block_until_ready(function(*operands))
    rounds = [_device_seconds(function, operands, calls) or _wall_seconds(function, operands, calls) for _ in range(3)]
    return result, statistics.median(rounds), (min(rounds), max(rounds))


def _wall_seconds(function, operands, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*operands)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def _device_seconds(function, operands, calls: int) -> float | None:
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with profiled(Path(folder)):
            _wall_seconds(function, operands, calls)
        return busy(read_events(Path(folder))) / 1e9 / calls or None


def copy_speed() -> float | None:
    """Bytes a second, read plus written, of copying 1 GiB on the GPU, in the dtype in which XLA does it faster; None on
    anything else, or without room for it."""
    if jax.default_backend() != "gpu":
        return None
    try:
        return max(_copy_speed(jnp.bfloat16), _copy_speed(jnp.float32))
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _copy_speed(dtype) -> float:
    array = jnp.zeros(COPIED // jnp.dtype(dtype).itemsize, dtype)
    return 2 * COPIED / timed(jax.jit(lambda x: x + 1), (array,), 10)[1]


def draw(case: Case, seed: int) -> tuple[Any, ...]:
    """Operands: the case's own, or normal values (uniform bytes for uint8), made on the device."""
    if case.draw is not None:
        return tuple(jax.tree.map(jnp.asarray, operand) for operand in case.draw(seed))
    keys = jax.random.split(jax.random.key(seed), max(len(case.args), 1))
    return tuple(_values(key, arg) for key, arg in zip(keys, case.args, strict=False))


def _values(key: jax.Array, arg: jax.ShapeDtypeStruct) -> jax.Array:
    if arg.dtype == jnp.uint8:
        return jax.random.bits(key, arg.shape, jnp.uint8)
    if not jnp.issubdtype(arg.dtype, jnp.floating):
        raise ValueError(f"a case with {arg.dtype} operands must say how to draw them")
    return jax.random.normal(key, arg.shape, arg.dtype)


@jax.jit
def _norms(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).ravel()), jnp.linalg.norm(b.ravel())


def relative_difference(got: Any, wanted: Any) -> float:
    """The largest of ||got - wanted|| / ||wanted|| over the outputs."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        off, size = map(float, _norms(a, b))
        worst = max(worst, off / size if size else off)
    return worst


def line(record: dict[str, Any]) -> str:
    """A record for people: kernel, reference, how many times faster, share of the bound."""
    kernel, reference = record["kernel"], record["reference"]
    if "error" in kernel:
        return f"{record['case']:48s} {kernel['error']}"
    took, other, share = kernel["microseconds"], reference.get("microseconds"), kernel["share_of_bound"]
    faster = "-" if other is None else f"{other / took:.2f}x"
    reached = "-" if share is None else f"{share:.0%}"
    return (
        f"{record['case']:48s} {took:10.1f} {'-' if other is None else format(other, '.1f'):>10s} {faster:>7s} "
        f"{reached:>6s} {record.get('difference', '-'):>9}"
    )


HEADER = f"{'case':48s} {'kernel us':>10s} {'xla us':>10s} {'faster':>7s} {'bound':>6s} {'differs':>9s}"
