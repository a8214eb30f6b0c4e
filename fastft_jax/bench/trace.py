"""Taking a profile with XLA's own profiler, and reading what ran on the device from it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

_CONTAINERS = re.compile(r"^(while|call|conditional|tuple|get-tuple-element|parameter|bitcast)\b")


@dataclass(frozen=True)
class Event:
    """One kernel or copy: what the profile calls it, the HLO instruction behind it (if it says), and when, in ns."""

    name: str
    hlo_op: str
    scope: str
    start: float
    duration: float
    copied: int | None = None  # bytes of a memory copy

    @property
    def end(self) -> float:
        return self.start + self.duration


@contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Leave a profile of what happens inside in `folder`, for XProf and Perfetto, too. Python calls are left out."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield


def read_events(folder: Path) -> list[Event]:
    """The device's events of the newest profile in `folder`, by start; of XLA's CPU threads where there is no GPU."""
    found = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        return []
    planes = list(jax.profiler.ProfileData.from_file(str(found[-1])).planes)
    gpu = [line for p in planes if "/device:GPU" in p.name for line in p.lines if "Stream" in line.name]
    if gpu:
        events = [_event(event) for line in gpu for event in line.events]
    else:
        threads = (line for plane in planes if plane.name == "/host:CPU" for line in plane.lines)
        events = [_event(event) for line in threads if line.name.startswith("tf_XLA") for event in line.events]
        events = [event for event in events if event.hlo_op and not _CONTAINERS.match(event.hlo_op)]
    return sorted(events, key=lambda event: event.start)


def busy(events: list[Event]) -> float:
    """Nanoseconds in which at least one of the events (sorted by start) ran."""
    total, until = 0.0, float("-inf")
    for event in events:
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def _event(event: Any) -> Event:
    stats = {key: str(value) for key, value in event.stats if key in ("hlo_op", "name", "tf_op", "memcpy_details")}
    size = re.search(r"size:(\d+)", stats.get("memcpy_details", ""))
    return Event(
        event.name,
        stats.get("hlo_op", ""),
        stats.get("name") or stats.get("tf_op", ""),
        event.start_ns,
        event.duration_ns,
        int(size[1]) if size else None,
    )
