"""A GGUF file's metadata and table, and its tensors as they are asked for.

The gguf package reads such files too, but spends ten seconds on the vocabulary of a current model. Layout (versions 2
and 3, little-endian): "GGUF", version u32, tensors u64, pairs u64; pairs (key, type u32, value); tensors (name,
dimensions u32, their lengths u64 with the row's first, type u32, offset u64); padding; data. A string is a u64 length
and UTF-8.
"""

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from jaxtyping import Float

from fastft_jax.convert.gguf.encode import threads
from fastft_jax.errors import CheckpointError

_NUMBERS = dict(enumerate(("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?"))) | {10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9
_PIECE = 1 << 20  # elements decoded at a time: what the decoder makes beside them stays small
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class StoredTensor:
    """One line of the table: the shape as in numpy, and where the bytes are in the file."""

    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


class GGUFFile:
    """`tensors` by name; `get` for the metadata. CheckpointError for a file that is missing or damaged."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._metadata, self.tensors = _parse(np.memmap(file, np.uint8, "r"))
        except (OSError, ValueError, LookupError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata: a number, a bool, a string, or a list of them."""
        return self._metadata.get(key, default)

    def decode(self, name: str, dtype: Any = np.float32) -> Float[np.ndarray, "..."]:
        """The tensor, decoded in float32 by every core, and rounded to `dtype`."""
        tensor = self.tensors[name]
        try:
            raw = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.start)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        if raw.size != tensor.nbytes:
            raise CheckpointError(f"{self.path} became shorter while {name} was read")
        if tensor.kind in PLAIN:
            return raw.view(PLAIN[tensor.kind]).astype(dtype, copy=False).reshape(tensor.shape)
        kind, out = gguf.GGMLQuantizationType[tensor.kind], np.empty(tensor.shape, dtype)
        rows, flat = raw.reshape(-1, raw.size * tensor.shape[-1] // out.size), out.reshape(-1, tensor.shape[-1])
        step = max(1, _PIECE // tensor.shape[-1])

        def decode(at: int) -> None:
            flat[at : at + step] = gguf.quants.dequantize(rows[at : at + step], kind)

        if len(rows) <= step:
            decode(0)
        else:
            with ThreadPoolExecutor(threads()) as pool:
                list(pool.map(decode, range(0, len(rows), step)))
        return out


def _parse(data: np.ndarray) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    reader = _Cursor(memoryview(data), 0)
    if bytes(reader.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = reader.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version} of the format is not known")
    tensor_count, pair_count = reader.number("<Q"), reader.number("<Q")
    metadata = {}
    for _ in range(pair_count):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    table = [
        (reader.string(), [reader.number("<Q") for _ in range(reader.number("<I"))], reader.number("<I"),
         reader.number("<Q"))
        for _ in range(tensor_count)
    ]  # fmt: skip
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    begin = reader.at + -reader.at % alignment
    tensors = {}
    for name, lengths, number, offset in table:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(lengths, dtype=object)) // block * size
        if lengths[0] % block or begin + offset + nbytes > len(data):
            raise ValueError(f"{name} does not fit in the file, which is cut short or damaged")
        tensors[name] = StoredTensor(tuple(reversed(lengths)), kind.name, begin + offset, nbytes)
    return metadata, tensors


class _Cursor:
    """Reads on from a place in the file."""

    def __init__(self, data: memoryview, at: int):
        self.data, self.at = data, at

    def take(self, n: int) -> memoryview:
        if n > len(self.data) - self.at:
            raise ValueError("it is cut short")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind in (_STRING, _ARRAY):
                return [self.value(kind) for _ in range(count)]
            return self._numbers(kind, count)
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: int, count: int) -> list:
        if not count:
            return []
        values = np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize), "<" + _NUMBERS[kind])
        # float32 by its shortest decimal: 1e-05 where it would be 9.99999974e-06
        return [float(str(v)) for v in values] if kind == 6 else values.tolist()
