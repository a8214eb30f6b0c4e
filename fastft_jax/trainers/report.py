"""What a run says: the line of a step, `metrics.jsonl`, the progress bar, trackers, and what it ran on.

`metrics.jsonl` has one JSON object a line: `{"step", "epoch", "loss", ...}` after logged steps and
`{"step", "epoch", "eval_loss", ...}` after evaluations. A resumed run first drops the rows after the step it resumes
from, so that no step is there twice.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Self, TextIO

from fastft_jax.trainers.environment import device_peak_flops, peak_memory
from fastft_jax.trainers.trackers import Tracker, make_tracker

METRICS = "metrics.jsonl"
GIB = 2**30


class Reporter:
    """Prints and records the progress of one run. Use it as a context manager, so that trackers are closed.

    Args:
        output_dir: the run's folder (made if absent).
        total_steps: optimizer steps of the whole run, resumed part included.
        report_to: trackers beside metrics.jsonl, of `sft_config.TRACKERS`.
        run_name: its name there; None: the folder's.
        config: options of the run, for the trackers.
        resumed_step: optimizer steps done before this process began.
        device: the jax device whose kind and memory are reported; None: no device is asked.
        stream: where lines go; None: standard output. A bar is drawn when it is a terminal.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        *,
        total_steps: int,
        report_to: list[str] | tuple[str, ...] = (),
        run_name: str | None = None,
        config: dict[str, Any] | None = None,
        resumed_step: int = 0,
        device: Any = None,
        stream: TextIO | None = None,
    ):
        self.folder = Path(output_dir)
        self.total_steps = total_steps
        self._device = device
        self._stream = stream or sys.stdout
        self._peak = device_peak_flops(device.device_kind) if device is not None else None
        self.folder.mkdir(parents=True, exist_ok=True)
        _keep_rows(self.folder / METRICS, resumed_step)
        self._metrics = open(self.folder / METRICS, "a", encoding="utf-8")
        self._bar = _bar(self._stream, total_steps, resumed_step)
        self._trackers: dict[str, Tracker] = {}
        try:
            for name in report_to:
                self._trackers[name] = make_tracker(
                    name, self.folder, run_name or self.folder.resolve().name, config or {}, resumed_step
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_terminal(self) -> bool:
        """Do lines go to a terminal (that shows colours)?"""
        return self._stream.isatty()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar to `step` (for steps that are not logged)."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def step(
        self,
        step: int,
        *,
        epoch: float,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
        flops: float | None = None,
        **more: float,
    ) -> None:
        """Report optimizer step `step` (from 1).

        Args:
            loss: mean over the trained tokens since the last report.
            tokens: positions computed since the last report (padding left out).
            seconds: wall time they took.
            flops: model FLOPs they needed, forward and backward; None leaves MFU out, as does an unknown device.
            more: further numbers for metrics.jsonl and the trackers, e.g. trained_tokens.
        """
        speed = tokens / seconds if seconds > 0 else None
        mfu = flops / seconds / self._peak if flops and self._peak and seconds > 0 else None
        memory = peak_memory(self._device)
        row = {
            "step": step,
            "epoch": round(epoch, 6),
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "seconds": round(seconds, 6),
            "tokens_per_second": None if speed is None else round(speed, 3),
            "mfu": None if mfu is None else round(mfu, 6),
            "peak_memory_bytes": memory,
            **more,
        }
        self._record(row)
        self.advance(step)
        self.say(
            step_line(
                step,
                self.total_steps,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens_per_second=speed,
                mfu=mfu,
                memory=memory,
            )
        )

    def evaluation(
        self, step: int, *, epoch: float, loss: float, token_accuracy: float | None = None, **more: float
    ) -> None:
        """Report an evaluation after `step`: loss is the mean over its trained tokens, perplexity its exponential."""
        row = {"step": step, "epoch": round(epoch, 6), "eval_loss": loss, "eval_perplexity": perplexity(loss)}
        if token_accuracy is not None:
            row["eval_token_accuracy"] = token_accuracy
        self._record(row | more)
        self.say(eval_line(step, self.total_steps, loss=loss, token_accuracy=token_accuracy))

    def close(self) -> None:
        """Close the bar, the file and the trackers; closing twice does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._metrics.close()
        for name in list(self._trackers):
            self._try_tracker(name, "close")
            self._trackers.pop(name, None)

    def _record(self, row: dict[str, Any]) -> None:
        row = {key: _finite(value) for key, value in row.items() if value is not None}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
        for name in list(self._trackers):
            self._try_tracker(name, "log", row["step"], numbers)

    def _try_tracker(self, name: str, method: str, *arguments: Any) -> None:
        """A tracker that fails (a server gone, a disk full) is dropped with a word; training goes on."""
        try:
            getattr(self._trackers[name], method)(*arguments)
        except Exception as error:
            del self._trackers[name]
            self.say(f"warning: {name} failed and is not written to any more: {error}")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: their names stand for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _keep_rows(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step`, and a last line that a killed process left half-written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    draft = path.with_suffix(".draft")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)


def _bar(stream: TextIO, total_steps: int, completed: int) -> Any:
    """A started rich progress bar at the bottom of a terminal, or None."""
    if not stream.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=stream), transient=True)
    bar.add_task("train", total=total_steps, completed=completed)
    bar.start()
    return bar


def step_line(
    step: int,
    total_steps: int,
    *,
    loss: float,
    learning_rate: float,
    grad_norm: float,
    tokens_per_second: float | None = None,
    mfu: float | None = None,
    memory: int | None = None,
) -> str:
    """`step 00120 (12.0%) | loss 1.234 | lr 2.0e-4 | grad_norm 0.52 | 16.4k tok/s | mfu 61% | mem 8.2 GiB`.

    What is not known is left out.
    """
    parts = [_head(step, total_steps), f"loss {loss:.3f}", f"lr {_short(learning_rate)}", f"grad_norm {grad_norm:.2f}"]
    if tokens_per_second is not None:
        fast = tokens_per_second >= 1000
        parts.append(f"{tokens_per_second / 1000:.1f}k tok/s" if fast else f"{tokens_per_second:.0f} tok/s")
    if mfu is not None:
        parts.append(f"mfu {mfu:.0%}")
    if memory is not None:
        parts.append(f"mem {memory / GIB:.1f} GiB")
    return " | ".join(parts)


def eval_line(step: int, total_steps: int, *, loss: float, token_accuracy: float | None = None) -> str:
    """`step 00120 (12.0%) | eval_loss 1.234 | perplexity 3.43 | token_accuracy 71.2%`."""
    parts = [_head(step, total_steps), f"eval_loss {loss:.3f}", f"perplexity {perplexity(loss):.2f}"]
    if token_accuracy is not None:
        parts.append(f"token_accuracy {token_accuracy:.1%}")
    return " | ".join(parts)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def _head(step: int, total_steps: int) -> str:
    return f"step {step:05d} ({100 * step / max(total_steps, 1):.1f}%)"


def _short(number: float) -> str:
    """2e-4 as 2.0e-4 (Python writes 2.0e-04)."""
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
