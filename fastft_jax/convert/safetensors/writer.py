"""Writing safetensors: the bytes `safetensors` itself would write, atomically, one tensor in memory at a time."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fastft_jax.convert.atomic import check_free_space, write_all, write_bytes, write_file
from fastft_jax.convert.safetensors.header import Layout, encode_header, nbytes
from fastft_jax.errors import CheckpointError, ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FORMAT_PT: Mapping[str, str] = {"format": "pt"}  # what PEFT and transformers write, and what they look for


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = _FORMAT_PT
) -> None:
    """One file, byte for byte `safetensors.numpy.save_file(tensors, path, metadata)`; it replaces `path` atomically.

    Raises CheckpointError (and leaves an older file as it was) when the disk is full or not writable.
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    layout = {name: (array.dtype.newbyteorder("="), array.shape) for name, array in arrays.items()}
    write_streamed(Path(path), layout, arrays.__getitem__, metadata)


def write_streamed(
    path: Path,
    layout: Layout,
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = _FORMAT_PT,
    *,
    durable: bool = True,
) -> None:
    """The same file from a layout known beforehand: `read(name)` is called once for each tensor, in file order."""
    header, order = encode_header(layout, metadata)

    def write(fd: int) -> None:
        write_all(fd, header)
        for name in order:
            write_all(fd, _raw(name, read(name), *layout[name]))

    size = len(header) + sum(nbytes(*entry) for entry in layout.values())
    write_file(path, write, needed=size, durable=durable)


def _raw(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> memoryview:
    """The tensor's bytes, row-major and little-endian, without a copy where it already lies so."""
    if array.shape != tuple(shape) or array.dtype.newbyteorder("=") != dtype:
        raise CheckpointError(f"tensor {name!r} is {array.dtype}{list(array.shape)}, announced as {dtype}{list(shape)}")
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return memoryview(little.reshape(-1).view(np.uint8))


def write_sharded(
    folder: Path,
    layout: Layout,
    read: Callable[[str], np.ndarray],
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = _FORMAT_PT,
    *,
    durable: bool = True,
) -> list[str]:
    """`model-00001-of-00003.safetensors` ... and their index; a single `model.safetensors` when one shard is enough.

    Tensors go to shards in the layout's order, a new shard beginning where the next tensor would pass
    `max_shard_size` (as transformers does; one larger tensor gets a shard of its own). `read(name)` is called once a
    tensor, so memory holds one tensor. The index is written last. Returns the file names.
    Put it inside `atomic_folder` to make the whole folder appear at once.
    """
    folder, limit = Path(folder), parse_size(max_shard_size)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in layout.items():
        size = nbytes(*entry)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    total = sum(nbytes(*entry) for entry in layout.values())
    check_free_space(folder, total, str(folder))
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        write_streamed(folder / file, {name: layout[name] for name in names}, read, metadata, durable=durable)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_bytes(folder / "model.safetensors.index.json", text.encode())
    return files


def parse_size(size: int | str) -> int:
    """Bytes from 5000000, "5GB" (powers of ten) or "5GiB" (powers of two)."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(f"{size!r} is not a size: write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ConfigError(f"a size must be positive, got {size}")
    return size
