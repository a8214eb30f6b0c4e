"""How fast are 1 to 64 rows times an NF4 matrix? Every implementation, checked against float64, device time a product.

    python benchmarks/few_row_matmul.py [--out benchmarks/few_row_matmul.jsonl] [--rows 1 4] [--implementations triton]

Each timed program multiplies with weights of more than 200 MB in turn, so that the L2 cache holds none of them.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from fastft_jax.pallas_kernels import nf4
from fastft_jax.pallas_kernels.quantised_matmul import quantised_matmul
from fastft_jax.pallas_kernels.quantised_matmul.cases import ROWS, SHAPES, draw
from fastft_jax.trainers.environment import environment

ROOT = Path(__file__).resolve().parents[1]
WEIGHT_BYTES = 210e6
CALLS, REPEATS, WARM_UP = 5, 20, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "few_row_matmul.jsonl")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--implementations", nargs="+", default=["xla", "triton", "jax_triton"])
    arguments = parser.parse_args()
    facts = environment(jax.local_devices()[0])
    common = {"date": datetime.date.today().isoformat(), "device": facts["device"], "driver": facts.get("driver")}
    common |= {"packages": facts["packages"] | kernel_packages(), "command": " ".join(["python", *sys.argv])}
    for n, k in SHAPES:
        x, *first = draw(0, m=max(arguments.rows), n=n, k=k)
        first = [a[0] for a in first]
        exact = np.asarray(x, np.float64) @ decoded(*first, (n, k)).T
        one = jax.device_put(first)
        nbytes = sum(leaf.nbytes for leaf in one)
        # copies with other bytes' addresses: the values do not matter for the time
        weights = [jax.tree.map(lambda a: a.copy(), one) for _ in range(int(-(-WEIGHT_BYTES // nbytes)))]
        for m in arguments.rows:
            for implementation in arguments.implementations:
                record = common | {"implementation": implementation, "m": m, "n": n, "k": k}
                try:
                    record |= measure(implementation, jax.device_put(x[:m]), weights, exact[:m], (n, k), nbytes)
                except Exception as error:  # one that does not run must not cost the others their turn
                    record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                print(json.dumps({key: record[key] for key in record if key not in common}), flush=True)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


def measure(implementation: str, x, weights, exact: np.ndarray, shape: tuple[int, int], nbytes: int) -> dict:
    """Error, wall time and device time of a product, and the bandwidth that the device time means."""
    program = jax.jit(lambda x, ws: [quantised_matmul(x, *w, shape=shape, implementation=implementation) for w in ws])
    y = np.asarray(program(x, weights)[0], np.float64)
    times = []
    for _ in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        out = [program(x, weights) for _ in range(CALLS)]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / (CALLS * len(weights)))
    device = device_seconds(lambda: jax.block_until_ready(program(x, weights)))
    best = min(times) if device is None else device / len(weights)
    microseconds = [round(t * 1e6, 2) for t in times[WARM_UP:]]
    return {
        "relative_error": float(f"{np.linalg.norm(y - exact) / np.linalg.norm(exact):.2e}"),
        "microseconds": statistics.median(microseconds),
        "microseconds_range": [min(microseconds), max(microseconds)],
        "device_microseconds": None if device is None else round(device / len(weights) * 1e6, 2),
        "terabytes_per_second": round(nbytes / best / 1e12, 3),
        "weights": len(weights),
    }


def device_seconds(run) -> float | None:
    """Time that the GPU's kernels took in all, from a profile; None where there is no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        lines = [line for plane in profile.planes if plane.name.startswith("/device:GPU") for line in plane.lines]
        kernels = [event.duration_ns for line in lines if line.name.startswith("Stream") for event in line.events]
    return sum(kernels) / 1e9 if kernels else None


def decoded(codes, absmax, scale, offset, shape: tuple[int, int]) -> np.ndarray:
    """The weight in float64, from float32 absmax and codes."""
    absmax = nf4.dynamic_map()[absmax] * np.repeat(scale, 256)[: len(absmax)] + offset
    values = nf4.NF4_CODE[np.concatenate([codes >> 4, codes & 15], 1)]
    return (values * absmax[:, None]).reshape(shape).astype(np.float64)


def kernel_packages() -> dict[str, str | None]:
    versions = {}
    for name in ("jax-triton", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


if __name__ == "__main__":
    main()
