"""TensorBoard, Weights & Biases and MLflow, imported only when asked for, and without torch or TensorFlow.

Each tracker has `log(step, numbers)` and `close()`. A run that is resumed goes on in the same W&B or MLflow run: their
ids are kept in `trackers.json` in the output folder.
"""

import importlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Protocol

from fastft_jax.errors import ConfigError

_IDS = "trackers.json"


class Tracker(Protocol):
    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def make_tracker(name: str, folder: Path, run_name: str, config: dict[str, Any], resumed_step: int) -> Tracker:
    """Open the tracker `name`: tensorboard, wandb or mlflow.

    Args:
        folder: the run's output folder.
        config: options of the run, shown by the tracker.
        resumed_step: 0 for a new run; else what was logged after this step is superseded.

    Raises:
        ConfigError: an unknown name, or its package is not installed.
    """
    makers = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
    if name not in makers:
        raise ConfigError(f"report_to: {name!r} is not a tracker; there are {', '.join(makers)}")
    try:
        return makers[name](folder, run_name, config, resumed_step)
    except ImportError as error:
        raise ConfigError(
            f'report_to: {name} is not installed ({error}); pip install "fastft-jax[tracking]"'
        ) from error


class TensorBoard:
    """Event files in `<folder>/tensorboard`: records of tensorboard's own protocol buffers, in a file opened here."""

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any], resumed_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        place = folder / "tensorboard"
        place.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, so a resumed run's must sort after the first one's
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(open(place / name, "ab"))
        self._write(file_version="brain.Event:2")
        if resumed_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=resumed_step + 1, session_log=start)  # discards what was logged from there on

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        value = self._summary.Summary.Value
        values = [value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._write(step=step, summary=self._summary.Summary(value=values))

    def close(self) -> None:
        self._records.close()


class WandB:
    """One Weights & Biases run; project, entity and mode come from wandb's own environment variables."""

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any], resumed_step: int):
        wandb = importlib.import_module("wandb")
        known = _ids(folder).get("wandb") if resumed_step else None
        again = {"id": known, "resume": "allow"} if known else {}
        self._run = wandb.init(name=run_name, config=config, dir=str(folder), **again)
        _remember(folder, "wandb", self._run.id)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """One MLflow run; the tracking server and experiment come from MLflow's own environment variables."""

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any], resumed_step: int):
        self._mlflow = importlib.import_module("mlflow")
        known = _ids(folder).get("mlflow") if resumed_step else None
        run = self._mlflow.start_run(run_id=known) if known else self._mlflow.start_run(run_name=run_name)
        _remember(folder, "mlflow", run.info.run_id)
        if not known:  # MLflow refuses to change a parameter
            self._mlflow.log_params({key: str(value)[:500] for key, value in _flat(config).items()})

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _ids(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / _IDS).read_text())
    except (OSError, ValueError):
        return {}


def _remember(folder: Path, name: str, identity: str) -> None:
    (folder / _IDS).write_text(json.dumps(_ids(folder) | {name: identity}))
