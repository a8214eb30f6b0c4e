"""Writing on a bad day: a full disk, a kill in the middle, a folder that is in the way."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.numpy as oracle

from fastft_jax.convert import atomic
from fastft_jax.convert.safetensors import SafetensorsFile, atomic_folder, write_safetensors, write_sharded
from fastft_jax.errors import CheckpointError


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_disk_that_fills_up_midway_leaves_the_old_file_and_tells_the_size(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"old": np.ones(3, np.float32)})
    before, real, calls = path.read_bytes(), os.write, []

    def full(fd, data):
        calls.append(len(data))
        if len(calls) == 2:
            return real(fd, data[:100])  # a nearly full disk takes a part first
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(atomic.os, "write", full)
    with pytest.raises(CheckpointError, match=r"model.safetensors could not be written \(4\d\d\d bytes.*No space left"):
        write_safetensors(path, {"new": np.ones(1000, np.float32)})
    assert path.read_bytes() == before and names_in(tmp_path) == ["model.safetensors"]


def test_too_little_free_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(atomic.os, "write", lambda fd, data: pytest.fail("wrote to a full disk"))
    big = np.ones(1000, np.float32)
    with pytest.raises(CheckpointError, match=r"needs 4\d\d\d bytes and the disk has 1000 left"):
        write_safetensors(tmp_path / "x.safetensors", {"w": big})
    with pytest.raises(CheckpointError, match="needs 8000 bytes"):
        write_sharded(tmp_path, dict.fromkeys("vw", (big.dtype, big.shape)), lambda name: big, 4000)
    assert names_in(tmp_path) == []


def run_code(code, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_a_real_limit_on_the_file_size_is_met_like_a_full_disk(tmp_path):
    """RLIMIT_FSIZE makes the kernel itself refuse the write, in the middle of the file."""
    write_safetensors(tmp_path / "model.safetensors", {"old": np.ones(3, np.float32)})
    before = (tmp_path / "model.safetensors").read_bytes()
    code = """
        import sys, numpy as np
        from pathlib import Path
        from fastft_jax.errors import CheckpointError
        from fastft_jax.convert.safetensors import atomic_folder, write_safetensors
        folder = Path(sys.argv[1])
        try:
            write_safetensors(folder / "model.safetensors", {"new": np.ones(1 << 20, np.uint8)})
        except CheckpointError as error:
            print("file:", error)
        try:
            with atomic_folder(folder / "new") as new:
                (new / "small").write_text("fits")
                (new / "big").write_bytes(bytes(1 << 20))
        except CheckpointError as error:
            print("folder:", error)
    """
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    out = run_code(code, tmp_path, preexec_fn=limit)
    assert out.returncode == 0, out.stderr
    assert "file:" in out.stdout and "folder:" in out.stdout and out.stdout.count("File too large") == 2
    size = len(oracle.save({"new": np.ones(1 << 20, np.uint8)}, {"format": "pt"}))
    assert f"({size} bytes are needed)" in out.stdout
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert names_in(tmp_path) == ["model.safetensors"]


def test_a_kill_in_the_middle_leaves_the_old_file_whole_and_the_next_write_clears_the_rest(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"old": np.ones(3, np.float32)})
    before = path.read_bytes()
    code = """
        import sys, time, numpy as np
        from pathlib import Path
        from fastft_jax.convert.safetensors import write_streamed
        def slow(name):
            if name == "b":
                print("half", flush=True)
                time.sleep(60)
            return np.ones(100_000, np.uint8)
        layout = {name: (np.dtype(np.uint8), (100_000,)) for name in "abc"}
        write_streamed(Path(sys.argv[1]), layout, slow)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), path], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.read_bytes() == before
    assert len(names_in(tmp_path)) == 2  # the killed writer's temporary file
    write_safetensors(path, {"new": np.ones(3, np.float32)})
    assert names_in(tmp_path) == ["model.safetensors"] and SafetensorsFile(path).tensors.keys() == {"new"}


def test_a_living_writers_temporary_file_is_not_cleared_away(tmp_path):
    path = tmp_path / "model.safetensors"

    def outer(fd):
        write_safetensors(path, {"inner": np.ones(3, np.float32)})
        atomic.write_all(fd, b"outer")

    atomic.write_file(path, outer)
    assert path.read_bytes() == b"outer" and names_in(tmp_path) == ["model.safetensors"]


def test_files_get_the_permissions_the_umask_gives(tmp_path):
    old = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "x.safetensors", {})
    finally:
        os.umask(old)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_cannot_be_written_to_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="could not be written"):
        write_safetensors(tmp_path / "absent" / "x.safetensors", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"), atomic_folder(tmp_path / "file" / "new"):
        pytest.fail("there is nowhere to write to")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "deep" / "final"
    with pytest.raises(KeyError), atomic_folder(final) as folder:
        (folder / "half").write_text("x")
        raise KeyError
    assert names_in(tmp_path / "deep") == []
    with atomic_folder(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not final.exists()
    assert (final / "sub" / "file").read_text() == "x" and names_in(tmp_path / "deep") == ["final"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_with_contents_is_replaced_only_when_asked_and_only_at_the_end(tmp_path, monkeypatch, exchange):
    if not exchange:  # systems without renameat2
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    final = tmp_path / "final"
    final.mkdir()
    with atomic_folder(final) as folder:  # an empty one is no obstacle
        (folder / "old").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not empty"), atomic_folder(final):
        pytest.fail("the body must not run")
    with pytest.raises(KeyError), atomic_folder(final, overwrite=True):
        raise KeyError
    assert names_in(final) == ["old"]
    with atomic_folder(final, overwrite=True) as folder:
        (folder / "new").write_text("y")
        assert names_in(final) == ["old"]
    assert names_in(final) == ["new"] and names_in(tmp_path) == ["final"]
    with pytest.raises(CheckpointError, match="is not a folder"), atomic_folder(final / "new", overwrite=True):
        pytest.fail("a file is never replaced by a folder")


def test_a_kill_while_a_folder_is_built_leaves_the_old_one_and_the_next_build_clears_the_rest(tmp_path):
    final = tmp_path / "final"
    with atomic_folder(final) as folder:
        (folder / "old").write_text("x")
    code = """
        import sys, time
        from fastft_jax.convert.safetensors import atomic_folder
        with atomic_folder(sys.argv[1], overwrite=True) as folder:
            (folder / "half").write_text("x")
            print("half", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), final], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"half\n"
    child.kill()
    child.wait()
    assert names_in(final) == ["old"] and len(names_in(tmp_path)) == 2
    with atomic_folder(final, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert names_in(final) == ["new"] and names_in(tmp_path) == ["final"]
