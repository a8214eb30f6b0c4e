"""GGUF files written as a stream: header, metadata and table first, then each tensor's bytes as they are encoded.

Layout (github.com/ggml-org/ggml, docs/gguf.md): magic, version, counts, key-value pairs, a table of (name, shape, type,
offset), then the data, every tensor padded to 32 bytes. The head is made by the gguf package.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf.gguf_writer import WriterState
from jaxtyping import Float

from fastft_jax.convert.atomic import check_free_space, write_all, write_file
from fastft_jax.convert.gguf.encode import encode, encoded_bytes, threads
from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.errors import CheckpointError

ALIGNMENT = 32


@dataclass(frozen=True)
class Tensor:
    """A tensor to write, computed when it is its turn; `shape` as in numpy. `importance`: see `encode`."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Float[np.ndarray, "..."]]
    importance: Float[np.ndarray, "*E K"] | None = None


@dataclass(frozen=True)
class File:
    """One file to write: its metadata, and the type of every tensor by name."""

    path: Path
    writer: gguf.GGUFWriter
    kinds: dict[str, str]


def write_gguf(
    files: Sequence[File], tensors: Sequence[Tensor], check: Callable[[File, Path], None] | None = None
) -> None:
    """Writes several files of the same tensors in one pass, on every core; each appears whole or not at all.

    The disk is asked first for the room that all of them take. Every file's table is read back before it gets its
    name, and `check(file, where it is until then)` is asked, which may raise. Raises CheckpointError for a full disk,
    and for a tensor with values that are not finite.
    """
    heads = [_head(file, tensors) for file in files]
    sizes = [len(h) + sum(_padded(encoded_bytes(f.kinds[t.name], t.shape)) for t in tensors)
             for f, h in zip(files, heads, strict=True)]  # fmt: skip
    for folder in {file.path.parent for file in files}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be made: {error.strerror}; nothing was written") from error
        needed = sum(size for file, size in zip(files, sizes, strict=True) if file.path.parent == folder)
        check_free_space(folder, needed, f"GGUF in {folder}")

    def looked_at(file: File, path: Path) -> None:
        check_file(path, file.kinds, tensors)
        if check is not None:
            check(file, path)

    with ThreadPoolExecutor(threads()) as pool:
        _nested(files, sizes, [], lambda fds: _write(files, heads, sizes, tensors, pool, fds), looked_at)


def _nested(
    files: Sequence[File],
    sizes: Sequence[int],
    fds: list[int],
    write: Callable[[list[int]], None],
    check: Callable[[File, Path], None],
) -> None:
    """`write` with a descriptor for each file, all of them temporary until it has returned; then `check` of each."""
    if len(fds) == len(files):
        write(fds)
        return
    file, needed = files[len(fds)], sizes[len(fds)]
    inner = partial(_nested, files, sizes, write=write, check=check)
    write_file(file.path, lambda fd: inner(fds=[*fds, fd]), needed=needed, check=partial(check, file))


def _write(files, heads, sizes, tensors: Iterable[Tensor], pool: Executor, fds: list[int]) -> None:
    for fd, head in zip(fds, heads, strict=True):
        write_all(fd, head)
    for tensor, w in _read_ahead(tensors):
        if w.shape != tensor.shape:
            raise ValueError(f"{tensor.name} has shape {w.shape}, announced {tensor.shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(w.sum())
        if not finite and not np.isfinite(w).all():
            raise CheckpointError(f"GGUF: {tensor.name} has values that are not finite; nothing was written")
        by_kind: dict[str, list[int]] = {}
        for file, fd in zip(files, fds, strict=True):
            by_kind.setdefault(file.kinds[tensor.name], []).append(fd)
        for kind, targets in by_kind.items():
            written = 0
            for piece in encode(kind, w, pool, tensor.importance):
                written += piece.size
                for fd in targets:
                    write_all(fd, piece.data)
            for fd in targets:
                write_all(fd, bytes(_padded(written) - written))
    for file, fd, size in zip(files, fds, sizes, strict=True):
        if os.fstat(fd).st_size != size:
            raise CheckpointError(f"{file.path} came out {os.fstat(fd).st_size} bytes long, not {size}")


def _read_ahead(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Float[np.ndarray, "..."]]]:
    """Each tensor with its values; the next ones are computed while the caller encodes these."""
    with ThreadPoolExecutor(1) as reader:
        pending: list[tuple[Tensor, Future]] = []
        for tensor in tensors:
            pending.append((tensor, reader.submit(tensor.read)))
            if len(pending) > 1:
                before, values = pending.pop(0)
                yield before, values.result()
        for last, values in pending:
            yield last, values.result()


def _head(file: File, tensors: Iterable[Tensor]) -> bytes:
    writer = file.writer
    for t in tensors:
        kind = gguf.GGMLQuantizationType[file.kinds[t.name]]
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), encoded_bytes(kind.name, t.shape), raw_dtype=kind)
    out = io.BytesIO()
    writer.fout, writer.state = [out], WriterState.EMPTY  # it would open a file of its own
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    head = out.getvalue()
    return head + bytes(_padded(len(head)) - len(head))


def _padded(n: int) -> int:
    return n + -n % ALIGNMENT


def check_file(path: Path, kinds: dict[str, str], tensors: Sequence[Tensor]) -> None:
    """Reads the file's table back and compares; CheckpointError where it is not what was to be written."""
    found = {name: (t.shape, t.kind) for name, t in GGUFFile(path).tensors.items()}
    for tensor in tensors:
        if found.pop(tensor.name, None) != (tensor.shape, kinds[tensor.name]):
            raise CheckpointError(f"{path}: {tensor.name} read back is not what was written")
    if found:
        raise CheckpointError(f"{path} holds {next(iter(found))}, which was not written")
