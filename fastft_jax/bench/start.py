"""Where the time from the start of the process to the end of its first step goes."""

from typing import Any

import jax

from fastft_jax.bench.process import process_age

_COMPILED, _FOUND = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"


class Start:
    """Splits the process's life into named phases, one after the other, and counts the programs it compiles.

    Seconds are None where the process's age is not known. `trace` and `compile` come from one call that does both.
    """

    def __init__(self):
        self.seconds: dict[str, float | None] = {}
        self.programs, self.from_cache, self.xla_seconds = 0, 0, 0.0
        self._until: float | None = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_seconds)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_seconds(self, event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILED:
            self.programs += 1
            self.xla_seconds += seconds

    def _on_event(self, event: str, **_: Any) -> None:
        self.from_cache += event == _FOUND

    def end(self, phase: str, age: float | None = None) -> None:
        """`phase` ends now (or ended at that age of the process); the next one begins."""
        age = process_age() if age is None else age
        known = age is not None and self._until is not None
        self.seconds[phase] = round(age - self._until, 2) if known else None
        self._until = age

    def end_compile(self, xla_seconds_before: float) -> None:
        """Tracing and compiling end now: `xla_seconds` since then were XLA's, the others Python's."""
        self.end("trace")
        compiled = round(self.xla_seconds - xla_seconds_before, 2)
        if self.seconds["trace"] is not None:
            self.seconds["trace"] = round(self.seconds["trace"] - compiled, 2)
        self.seconds["compile"] = compiled

    def record(self) -> dict[str, Any]:
        """Seconds by phase, and how many programs were compiled, or read from the cache on disk, in how long."""
        programs = {"count": self.programs, "from_cache": self.from_cache, "seconds": round(self.xla_seconds, 2)}
        return {"start_seconds": dict(self.seconds), "start_programs": programs}

    def line(self) -> str:
        """For people: `start: imports 3.1, weights 1.2, .. s; 12 programs`."""
        phases = ", ".join(f"{name} {'-' if s is None else format(s, '.1f')}" for name, s in self.seconds.items())
        cached = f", {self.from_cache} of them from the cache" if self.from_cache else ""
        return f"start, s: {phases} ({self.programs} programs in {self.xla_seconds:.1f} s{cached})"
