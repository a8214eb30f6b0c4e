"""The header of a safetensors file: 8 bytes of length, JSON padded with spaces to a multiple of 8, then the data.

Format: https://github.com/huggingface/safetensors (README, "Format"); the order and the limits are its Rust library's.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from fastft_jax.errors import CheckpointError

# In the library's own order: it lays tensors out from the last of these to the first, then by name.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_MAX_HEADER = 100_000_000  # the library's own limit: a larger length is not a header but damage

Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `stop` are byte positions in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor. Python integers: a damaged header must not overflow."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def encode_header(layout: Layout, metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """The bytes in front of the data (length included), and the names in the order in which the data must follow.

    Equal to `safetensors.numpy.save_file`: dtypes from wide to narrow, then names; compact JSON, padded with spaces.
    """
    for name, (dtype, _) in layout.items():
        if dtype not in _NAMES:
            raise CheckpointError(f"tensor {name!r}: safetensors cannot hold dtype {dtype}")
        if name == "__metadata__":
            raise CheckpointError("a tensor cannot be named '__metadata__': safetensors keeps its metadata there")
    order = sorted(layout, key=lambda name: (-_RANK[layout[name][0]], name))
    header: dict = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        dtype, shape = layout[name]
        end = position + nbytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def read_header(file: BinaryIO, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in file order) and metadata of an open file; CheckpointError on anything that is not whole and sound."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if prefix == b"version ":  # what git leaves in place of a large file that was not pulled
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` there")
    if len(prefix) < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes cannot hold a safetensors header; fetch it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path} is not a safetensors file: its header claims {length} bytes")
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated: the header alone needs {8 + length} bytes and the file has {size}; fetch it again"
        )
    header = parse_json_object(file.read(length), f"{path}: the safetensors header")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: the header's __metadata__ is not a table of strings")
    data_start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_offsets(path, tensors, data_start, size)
    return tensors, metadata


def parse_json_object(raw: bytes, what: str) -> dict:
    """A JSON object without repeated keys; CheckpointError saying `what` is damaged."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{what} lists {twice!r} twice")
        return table

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}): the file is damaged, fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object: the file is damaged, fetch it again")
    return value


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} has no dtype, shape and data_offsets: the header is damaged")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {entry['dtype']!r}, which is not one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where} has shape {shape!r}: the header is damaged")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{where} has data_offsets {offsets!r}: the header is damaged")
    start, stop = offsets
    needed = nbytes(dtype, tuple(shape))
    if stop - start != needed:
        raise CheckpointError(
            f"{where}: {entry['dtype']}{shape} needs {needed} bytes, its data_offsets {offsets} hold {stop - start}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + stop)


def _check_offsets(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """The format allows neither overlaps nor holes, and the data ends where the file does."""
    position, previous = data_start, None
    for name, info in tensors.items():
        if info.start < position:
            raise CheckpointError(f"{path}: the bytes of tensors {previous!r} and {name!r} overlap")
        if info.start > position:
            raise CheckpointError(f"{path}: {info.start - position} bytes before tensor {name!r} belong to no tensor")
        position, previous = info.stop, name
    if position > size:
        cut = next(name for name, info in tensors.items() if info.stop > size)
        raise CheckpointError(
            f"{path} is truncated: {size} of {position} bytes, tensor {cut!r} is cut off; fetch the file again"
        )
    if position < size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor belong to no tensor")
