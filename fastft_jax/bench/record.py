"""What a record holds beside its numbers, how it is kept (a JSON object a line), and its line for people."""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import jax


def facts(command: str, known: dict[str, Any]) -> dict[str, Any]:
    """Date, card, driver, power limit, versions and the command: what it takes to run it again.

    known: what `environment` said of the device.
    """
    device = jax.local_devices()[0]
    out = {"date": datetime.date.today().isoformat(), "device": known["device"], "driver": known.get("driver")}
    out["power_limit_watts"] = _power_limit() if device.platform == "gpu" else None
    return out | {"packages": known["packages"], "xla_flags": known["xla_flags"], "command": command}


def append(path: Path, record: dict[str, Any]) -> None:
    """One more line at the end of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _power_limit() -> float | None:
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return float(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


_COLUMNS = (
    ("policy", 10),
    ("batch", 5),
    ("seq", 7),
    ("tok/s", 9),
    ("range", 17),
    ("ms/step", 9),
    ("mfu", 6),
    ("peak GiB", 8),
    ("program", 8),
    ("compile s", 9),
    ("first s", 8),
)
HEADER = " ".join(f"{name:>{width}s}" for name, width in _COLUMNS)


def line(run: dict[str, Any]) -> str:
    """A run under HEADER; what is not known is a dash."""
    cells = [run["policy"] if isinstance(run["policy"], str) else "table", str(run["batch"]), str(run["seq"])]
    if "error" not in run:
        low, high = run["tokens_per_second_range"]
        cells += [
            f"{run['tokens_per_second']:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            f"{run['milliseconds_per_step']:.1f}",
            _or_dash(run["mfu"], "{:.1%}"),
            _or_dash(run["peak_memory_bytes"], "{:.2f}", 2**30),
            _or_dash(run["program_bytes"], "{:.2f}", 2**30),
            f"{run['compile_seconds']:.1f}",
            _or_dash(run.get("start_to_first_step_seconds"), "{:.1f}"),
        ]
    widths = [width for _, width in _COLUMNS]
    text = " ".join(f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=False))
    return f"{text} {run['error']}" if "error" in run else text


def _or_dash(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else form.format(value / unit)
