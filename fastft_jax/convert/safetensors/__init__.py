"""Safetensors checkpoints: a lazy reader of Hugging Face folders, and (from writer.py) the writers.

Tensors are read with plain file reads into buffers of their own. A memory map would be shorter, but its touched pages
count as this process's memory, and a 16 GB checkpoint would appear to need 16 GB of RAM.
"""

import difflib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from fastft_jax.convert.atomic import atomic_folder
from fastft_jax.convert.safetensors.header import TensorInfo, parse_json_object, read_header
from fastft_jax.convert.safetensors.writer import write_safetensors, write_sharded, write_streamed
from fastft_jax.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "SafetensorsFile",
    "atomic_folder",
    "write_safetensors",
    "write_sharded",
    "write_streamed",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SLICE = 16 << 20  # a slice is long enough to keep a disk busy, and short enough to give every thread one
_PARALLEL_SLICES = 4  # from 64 MB on, starting threads costs less than it saves
_MAX_THREADS = 8


class SafetensorsFile:
    """One file: its header is read and checked at once, its tensors when asked for."""

    def __init__(self, path: Path):
        """CheckpointError when the file is missing, truncated, or its header does not describe it."""
        self.path = Path(path)
        try:
            with open(self.path, "rb", buffering=0) as file:
                self.tensors, self.metadata = read_header(file, self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """The tensor, or `tensor[row]` alone, in a new array of its own. Safe to call from several threads."""
        info = self.tensors[name]
        if row is not None:
            size = (info.stop - info.start) // info.shape[0]
            info = TensorInfo(info.dtype, info.shape[1:], info.start + row * size, info.start + (row + 1) * size)
        array = np.empty(info.shape, info.dtype)
        raw = memoryview(array.reshape(-1).view(np.uint8))
        try:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                self._fill(fd, raw, info, name)
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error.strerror}") from error
        return array

    def _fill(self, fd: int, raw: memoryview, info: TensorInfo, name: str) -> None:
        fill = partial(self._fill_slice, fd, raw, info.start, name)
        starts = range(0, len(raw), _SLICE)
        threads = min(_MAX_THREADS, os.cpu_count() or 1, len(starts))
        if threads == 1 or len(starts) < _PARALLEL_SLICES:
            for start in starts:
                fill(start)
            return
        # preadv releases the GIL: slices of a large tensor are copied, and their pages mapped, side by side.
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, starts):
                pass

    def _fill_slice(self, fd: int, raw: memoryview, base: int, name: str, start: int) -> None:
        stop = min(start + _SLICE, len(raw))
        while start < stop:
            n = os.preadv(fd, [raw[start:stop]], base + start)
            if n == 0:
                raise CheckpointError(f"{self.path} became shorter while tensor {name!r} was read")
            start += n


class Checkpoint:
    """The tensors of a Hugging Face model folder, read one at a time.

    `model.safetensors` is taken when it is there, else the shards of `model.safetensors.index.json`: the order in
    which transformers looks. Every tensor of the shards belongs to the checkpoint, listed in the index or not
    (transformers loads them too); what the index lists must be in the shard it names.
    """

    def __init__(self, folder: Path, files: Iterable[SafetensorsFile]):
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self._files:
                    raise CheckpointError(
                        f"{folder}: tensor {name!r} is in both {self._files[name].path.name} and {file.path.name}"
                    )
                self._files[name] = file

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Reads the index and every shard's header. CheckpointError names what is missing, damaged or unsafe."""
        folder = Path(folder).expanduser()
        if not folder.exists():
            raise CheckpointError(f"{folder} does not exist: a model folder with {SINGLE} or {INDEX} is needed")
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: pass the model folder that holds {SINGLE} or {INDEX}")
        if os.path.lexists(folder / SINGLE):
            return cls(folder, [SafetensorsFile(folder / SINGLE)])
        if not os.path.lexists(folder / INDEX):
            raise CheckpointError(_no_weights(folder))
        return cls(folder, _open_shards(folder))

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in file order."""
        return tuple(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def info(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """(dtype, shape) without reading the data; bfloat16 and float8 are ml_dtypes' types."""
        info = self._file(name).tensors[name]
        return info.dtype, info.shape

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """The tensor, or `tensor[row]` alone, in a new array of its own. Safe to call from several threads."""
        return self._file(name).read(name, row)

    def path_of(self, name: str) -> Path:
        """The file that holds the tensor (for messages)."""
        return self._file(name).path

    def missing(self, expected: Iterable[str]) -> list[str]:
        """What is expected and not there, in the order expected."""
        return [name for name in expected if name not in self._files]

    def unexpected(self, expected: Iterable[str]) -> list[str]:
        """What is there and not expected, in file order."""
        known = set(expected)
        return [name for name in self._files if name not in known]

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            near = difflib.get_close_matches(name, self._files, n=1)
            hint = f"; the nearest name there is {near[0]!r}" if near else ""
            raise CheckpointError(f"{self.folder} has no tensor {name!r}{hint}")
        return self._files[name]


def _no_weights(folder: Path) -> str:
    entries = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in entries if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    # training_args.bin and optimizer.pt lie in trainer folders that hold no model at all
    pickles = [name for name in pickles if not name.startswith(("training_args", "optimizer", "scheduler", "rng_"))]
    if pickles:
        return (
            f"{folder} has only pickled weights ({pickles[0]}): safetensors only; "
            f"convert with scripts/convert_bin_to_safetensors.py"
        )
    if "adapter_config.json" in entries:
        return f"{folder} is an adapter, not a model: {SINGLE} or {INDEX} is needed"
    found = ", ".join(entries[:8]) or "nothing"
    return f"{folder} has no weights: {SINGLE} or {INDEX} is needed, found {found}"


def _open_shards(folder: Path) -> list[SafetensorsFile]:
    path = folder / INDEX
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    weight_map = parse_json_object(raw, str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: the index is damaged, fetch it again")
    listed: dict[str, list[str]] = {}
    for name, entry in weight_map.items():
        if not isinstance(entry, str) or not _stays_inside(entry):
            raise CheckpointError(f"{path}: tensor {name!r} points outside the folder ({entry!r}); refused")
        listed.setdefault(entry, []).append(name)
    # is_file follows links on purpose: the hub's cache keeps shards as links to ../../blobs
    missing = [entry for entry in sorted(listed) if not (folder / entry).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(listed)} shards: {', '.join(missing)}")
    shards = []
    for entry in sorted(listed):
        shard = SafetensorsFile(folder / entry)
        absent = [name for name in listed[entry] if name not in shard.tensors]
        if absent:
            raise CheckpointError(f"{shard.path} does not hold {absent[0]!r}, which {INDEX} places there")
        shards.append(shard)
    return shards


def _stays_inside(entry: str) -> bool:
    """Judges the entry as written, under both systems' rules; what a link inside the folder leads to is the user's."""
    if not entry or "\0" in entry or "\\" in entry:
        return False
    posix = PurePosixPath(entry)
    return not posix.is_absolute() and ".." not in posix.parts and not PureWindowsPath(entry).drive
