"""Checkpoints of a run: folders `checkpoint-<step>`, written by orbax, complete or absent.

A checkpoint is built beside its final name, as `checkpoint-<step>.partial`: orbax writes the arrays, and
`manifest.json` (the leaves' names, shapes and dtypes, and the run's own `meta`) is put there last. Then one rename
makes it visible. So a process killed at any moment leaves a folder without a manifest, which the next start removes, or
one with a manifest, which the next start takes as the checkpoint it is. A folder is renamed to `.removing` before it is
deleted, so that a half-deleted one is never read either.

Leaves are stored under numbers, in the order of the tree, and their key paths are in the manifest: any pytree
(nnx.State, optax's named tuples) comes back into the very structure it is asked for, bit for bit.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from fastft_jax.errors import TrainingError

_NAME = re.compile(r"checkpoint-(\d+)")
_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_FORMAT = 1
# No room: disk full, quota reached, or a limit on the size of one file
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM_TEXT = re.compile(r"no space left on device|disk quota exceeded|file too large", re.IGNORECASE)


class CheckpointStore:
    """The checkpoints in `folder`.

    Making the object touches nothing; its first use clears away what a killed process left half-written or
    half-deleted.

    Args:
        folder: the run's output folder; made at the first `save`.
        save_total_limit: keep only so many newest checkpoints; None keeps all. Older ones go only after the new one is
            complete.
    """

    def __init__(self, folder: str | os.PathLike, save_total_limit: int | None = None):
        self.folder = Path(folder).absolute()
        self.save_total_limit = save_total_limit
        self._recovered = False

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        self._recover()
        if not self.folder.is_dir():
            return []
        found = ((_NAME.fullmatch(entry.name), entry) for entry in self.folder.iterdir())
        return sorted(int(name[1]) for name, entry in found if name and (entry / _MANIFEST).is_file())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`, without reading any array."""
        return self._manifest(step)["meta"]

    def save(self, step: int, arrays: Any, meta: dict[str, Any]) -> Path:
        """Write a checkpoint and return its folder; when this returns, it is complete and on disk.

        Args:
            step: optimizer steps done.
            arrays: any pytree of jax or numpy arrays and Python numbers (a typed PRNG key goes as its key_data).
            meta: anything JSON can hold.

        Raises:
            TrainingError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        import orbax.checkpoint as ocp

        self._recover()
        leaves = {name: np.asarray(leaf) for name, leaf in _named_leaves(arrays).items()}
        manifest = {
            "format": _FORMAT,
            "step": step,
            "leaves": [{"name": n, "shape": list(a.shape), "dtype": a.dtype.name} for n, a in leaves.items()],
            "meta": meta,
        }
        text = json.dumps(manifest, indent=1, allow_nan=False)  # before anything is written: a bad meta is a bug
        needed = sum(a.nbytes for a in leaves.values())
        partial = self.folder / f"checkpoint-{step}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(self.folder).free) < needed:
                raise OSError(errno.ENOSPC, f"{free / 1e6:.1f} MB are free")
            partial.mkdir()
            # orbax cannot hold arrays without elements; the manifest says all there is to say about them
            tree = {str(i): a for i, a in enumerate(leaves.values()) if a.size}
            if tree:
                with _quiet_orbax():
                    ocp.PyTreeCheckpointer().save(partial / _ARRAYS, tree)
            _write(partial / _MANIFEST, text)
            if self.path(step).exists():
                self._remove(self.path(step))
            partial.rename(self.path(step))
            _sync(self.folder)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._save_failed(error, step, needed)
        self._drop_oldest()
        return self.path(step)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint into the structure of `like` and return (arrays, meta).

        Leaves of `like` are arrays or jax.ShapeDtypeStruct; a numpy array comes back as numpy, a Python number as that,
        and everything else as a jax array on the sharding of `like`'s leaf, if it names one.

        Raises:
            TrainingError: there is no such checkpoint, it cannot be read, or its leaves are not those of `like`
                (the message names them).
        """
        import orbax.checkpoint as ocp

        manifest = self._manifest(step)
        stored = {leaf["name"]: (i, tuple(leaf["shape"]), leaf["dtype"]) for i, leaf in enumerate(manifest["leaves"])}
        wanted = _named_leaves(like)
        self._same_leaves(step, stored, wanted)
        chosen = {str(i): ocp.RestoreArgs(restore_type=np.ndarray) for i, shape, _ in stored.values() if 0 not in shape}
        try:
            with _quiet_orbax():
                read = (
                    ocp.PyTreeCheckpointer().restore(self.path(step) / _ARRAYS, restore_args=chosen) if chosen else {}
                )
        except Exception as error:
            raise TrainingError(
                f"{self.path(step)} cannot be read ({_first_line(error)}); remove it to go on from an older checkpoint"
            ) from error
        values = []
        for name, leaf in wanted.items():
            number, shape, dtype = stored[name]
            array = read[str(number)] if 0 not in shape else np.zeros(shape, np.dtype(dtype))
            values.append(_from_host(array, leaf))
        return jax.tree.unflatten(jax.tree.structure(like), values), manifest["meta"]

    def clear(self) -> None:
        """Remove every checkpoint, for a run that starts afresh in this folder."""
        for step in self.steps():
            self._remove(self.path(step))

    def _manifest(self, step: int) -> dict[str, Any]:
        self._recover()
        try:
            manifest = json.loads((self.path(step) / _MANIFEST).read_text())
        except FileNotFoundError:
            have = ", ".join(map(str, self.steps())) or "none"
            raise TrainingError(
                f"there is no complete checkpoint of step {step} in {self.folder} (steps: {have})"
            ) from None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.path(step) / _MANIFEST} cannot be read: {_first_line(error)}") from None
        if manifest.get("format") != _FORMAT:
            raise TrainingError(
                f"{self.path(step)} is of format {manifest.get('format')}; this version reads {_FORMAT}"
            )
        return manifest

    def _same_leaves(self, step: int, stored: dict[str, tuple], wanted: dict[str, Any]) -> None:
        problems = [f"missing {name}" for name in wanted if name not in stored]
        problems += [f"unexpected {name}" for name in stored if name not in wanted]
        for name, leaf in wanted.items():
            if name in stored:
                have, want = stored[name][1:], _spec(leaf)
                if have != want:
                    problems.append(f"{name} is {have[1]}{list(have[0])}, the run has {want[1]}{list(want[0])}")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise TrainingError(f"{self.path(step)} is not of this run: {'; '.join(problems[:3])}{more}")

    def _save_failed(self, error: Exception, step: int, needed: int) -> NoReturn:
        number = error.errno if isinstance(error, OSError) else None
        said = _NO_ROOM_TEXT.search(str(error))
        if number in _NO_ROOM or said:
            why = said[0] if said else _first_line(error)
            raise TrainingError(
                f"no room for checkpoint {step} in {self.folder}: it needs {needed / 1e6:.1f} MB ({why}); "
                "free some, or lower save_total_limit. Older checkpoints are intact"
            ) from error
        raise TrainingError(f"checkpoint {step} cannot be written to {self.folder}: {_first_line(error)}") from error

    def _drop_oldest(self) -> None:
        if self.save_total_limit is not None:
            for step in self.steps()[: -self.save_total_limit]:
                self._remove(self.path(step))

    def _remove(self, folder: Path) -> None:
        doomed = folder.with_name(folder.name + ".removing")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _recover(self) -> None:
        if self._recovered:
            return
        self._recovered = True
        for entry in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            stem, _, suffix = entry.name.partition(".")
            if not _NAME.fullmatch(stem) or suffix not in ("partial", "removing"):
                continue
            final = self.folder / stem
            if suffix == "partial" and (entry / _MANIFEST).is_file() and not final.exists():
                entry.rename(final)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def find_checkpoint(
    resume_from_checkpoint: bool | str | os.PathLike | None, output_dir: str
) -> tuple[Path, int] | None:
    """(folder of the store, step) that `resume_from_checkpoint` means, or None when nothing is to be resumed.

    Raises:
        TrainingError: True and `output_dir` has no complete checkpoint, or a path that is not one.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        step = CheckpointStore(output_dir).latest()
        if step is None:
            raise TrainingError(
                f"{output_dir} has no complete checkpoint to resume from; leave resume_from_checkpoint out"
            )
        return Path(output_dir), step
    path = Path(resume_from_checkpoint)
    name = _NAME.fullmatch(path.name)
    if name is None or not (path / _MANIFEST).is_file():
        raise TrainingError(f"{path} is not a checkpoint; give a folder checkpoint-<step> that a run wrote")
    return path.parent, int(name[1])


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """orbax's threads log a traceback of every error that it also raises; the raised one is reported, in a line."""
    logger = logging.getLogger("absl")

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _from_host(array: np.ndarray, like: Any) -> Any:
    if isinstance(like, bool | int | float):
        return type(like)(array.item())
    if isinstance(like, np.ndarray | np.generic):
        return array if isinstance(like, np.ndarray) else array[()]
    return jax.device_put(array, getattr(like, "sharding", None))


def _spec(leaf: Any) -> tuple[tuple[int, ...], str]:
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def _write(path: Path, text: str) -> None:
    """Write and fsync under another name, then rename: the file is whole or absent."""
    draft = path.with_suffix(".draft")
    with open(draft, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Flush a folder's entries, so that renames outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.splitlines()[0][:200]
