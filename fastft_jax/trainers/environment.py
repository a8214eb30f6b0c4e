"""What a run runs on and with: package versions, Python, the device, its memory, its peak and its driver."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from fastft_jax import __version__

_PACKAGES = ("fastft-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def environment(device: Any = None) -> dict[str, Any]:
    """Versions and names, JSON-able. `device` is a jax device, or None when none is to be touched."""
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    facts["packages"] = {name: _version(name) for name in _PACKAGES}
    facts["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    if device is not None:
        facts["device"] = device.device_kind
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            facts["device_memory_bytes"] = stats["bytes_limit"]
        if device.platform == "gpu" and (driver := _driver()):
            facts["driver"] = driver
    return facts


def environment_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `environment()` for people, in two or three lines."""
    versions = " ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    lines = [f"python {facts['python']} on {facts['platform']}", versions]
    if "device" in facts:
        memory = facts.get("device_memory_bytes")
        size = f", {memory / 2**30:.1f} GiB for this process" if memory else ""
        driver = f", driver {facts['driver']}" if "driver" in facts else ""
        lines.append(f"device {facts['device']}{size}{driver}")
    return lines


def write_run_file(output_dir: str | os.PathLike, facts: dict[str, Any]) -> Path:
    """Store `facts` (resolved options, their origins, the environment) as `run.json` in `output_dir`, whole or not."""
    path = Path(output_dir) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return __version__ if name == "fastft-jax" else None  # run from a checkout that is not installed


def _driver() -> str | None:
    try:  # the kernel module says it at once; nvidia-smi takes a second on a host of several cards
        found = re.search(r"\s(\d{3,}\.[\d.]+)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    if found:
        return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def peak_memory(device: Any) -> int | None:
    """Largest number of bytes that were in use on the device so far; None where the backend does not count (CPU)."""
    return _memory(device, "peak_bytes_in_use")


def memory_in_use(device: Any) -> int | None:
    """Bytes in use on the device now; None where the backend does not count (CPU)."""
    return _memory(device, "bytes_in_use")


def _memory(device: Any, key: str) -> int | None:
    stats = device.memory_stats() if device is not None else None
    return None if not stats else stats.get(key)


# Dense bf16 tensor-core peaks with float32 accumulation, from NVIDIA's data sheets. The first name found in the
# device's kind decides, so a longer name stands before the shorter one it contains.
_PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIE", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("RTX A6000", 154.8),
    ("RTX 6000 ADA", 364.2),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def device_peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of a card by jax's `device_kind`, e.g. "NVIDIA H200"; None for one not in the table."""
    words = device_kind.upper().replace("-", " ").split()
    for name, tera in _PEAK_TFLOPS:
        wanted = name.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return tera * 1e12
    return None
