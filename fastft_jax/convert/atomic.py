"""Files and folders that appear whole or not at all: built under a temporary name, synced to disk, then renamed."""

import ctypes
import errno
import fcntl
import glob
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastft_jax.errors import CheckpointError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_counter = itertools.count()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: fsync of a file does not cover its directory entry."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """CheckpointError before the first byte is written, when the disk plainly cannot hold `needed` more."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{what} needs {needed} bytes and the disk has {free} left; nothing was written")


def _write_error(what: str, needed: int | None, error: OSError) -> CheckpointError:
    if error.errno in _FULL:
        size = "" if needed is None else f" ({needed} bytes are needed)"
        return CheckpointError(f"{what} could not be written{size}: {error.strerror}; nothing of it was left behind")
    return CheckpointError(f"{what} could not be written: {error}; nothing of it was left behind")


def _temporary(final: Path) -> Path:
    """A sibling's name that no other writer uses; leftovers of killed writers are cleared away first.

    A living writer holds a lock on its temporary entry, and the kernel drops the lock when it dies.
    """
    for left in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
        with suppress(OSError):
            fd = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            finally:
                os.close(fd)
    # The pid alone is not enough: in a container every run may have the same one.
    return final.with_name(f".{final.name}.{os.getpid()}-{next(_counter)}-{os.urandom(3).hex()}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_file(
    final: Path,
    write: Callable[[int], None],
    *,
    needed: int | None = None,
    durable: bool = True,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Calls `write(fd)` on a temporary sibling of `final`, then renames it over `final`.

    `check(temporary)` may look at the whole file before it gets its name, and raise. On any error (CheckpointError for
    a failing disk) the old `final`, if any, is as it was. `durable=False` skips the fsync: a crash of the machine,
    though not of the process, may then lose the file.
    """
    final = Path(final)
    temporary = None
    try:
        temporary = _temporary(final)
        if needed is not None:
            check_free_space(final.parent, needed, str(final))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with suppress(OSError):  # some file systems have no locks; then only the clearing of leftovers is less safe
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write(fd)
            if durable:
                os.fsync(fd)
            if check is not None:
                check(temporary)
            os.replace(temporary, final)
        finally:
            os.close(fd)
        if durable:
            sync_folder(final.parent)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _write_error(str(final), needed, error) from error
        raise


def write_all(fd: int, data: bytes | memoryview) -> None:
    """os.write until everything is out: one call moves at most 2 GiB, and fewer on a nearly full disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_bytes(final: Path, data: bytes) -> None:
    """Replaces a small file in one step."""
    write_file(final, lambda fd: write_all(fd, data), needed=len(data))


@contextmanager
def atomic_folder(final: Path, *, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """`with atomic_folder(path) as folder:` fill `folder`; it becomes `path` at the end, or vanishes on an error.

    An existing `path` with something in it is refused with CheckpointError unless `overwrite=True`, which swaps the
    whole folder: what it held is gone, and until the swap it is untouched. A full disk is a CheckpointError; any other
    error of the body passes through. `durable=False` as in `write_file`.
    """
    final = Path(final).expanduser().absolute()
    if final.is_symlink():
        final = final.resolve()
    _check_target(final, overwrite)
    temporary, lock = _begin_folder(final)
    try:
        try:
            yield temporary
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise _write_error(str(final), None, error) from error
        _check_target(final, overwrite)
        try:
            if durable:
                _sync_tree(temporary)
            _swap_in(temporary, final)
            if durable:
                sync_folder(final.parent)
        except OSError as error:
            raise _write_error(str(final), None, error) from error
    finally:
        os.close(lock)
        _remove(temporary)


def _begin_folder(final: Path) -> tuple[Path, int]:
    """The temporary folder, and the descriptor whose lock says that its writer lives."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(final)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise _write_error(str(final), None, error) from error
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temporary, lock


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(folder))


def _check_target(final: Path, overwrite: bool) -> None:
    if final.is_dir():
        if not overwrite and any(final.iterdir()):
            raise CheckpointError(f"{final} exists and is not empty: choose another folder, or ask to overwrite it")
    elif os.path.lexists(final):
        raise CheckpointError(f"{final} exists and is not a folder: choose another one")


def _swap_in(temporary: Path, final: Path) -> None:
    """Renames `temporary` to `final`; a folder already there ends up as `temporary`."""
    try:
        os.rename(temporary, final)  # replaces nothing, or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(temporary, final):
        return
    aside = temporary.with_name(temporary.name.removesuffix(".tmp") + ".old.tmp")
    os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(aside, final)
        raise
    _remove(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE): both names change owner in one step. False where there is no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange = -100, 2
    return call(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
