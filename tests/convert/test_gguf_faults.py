"""What a GGUF export leaves behind when it fails, wherever it fails: what was there before, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import gguf
import numpy as np
import pytest

from fastft_jax import FastLanguageModel
from fastft_jax.convert import atomic
from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.convert.gguf.writer import File, Tensor, write_gguf
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.export import main

VALUES = {f"blk.{i}.ffn_up.weight": np.full((4, 64), i + 1, np.float32) for i in range(3)}
KINDS = ("F32", "Q8_0")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def write(folder, factor: float = 1.0) -> None:
    """Two files of three tensors each, in one pass."""
    tensors = [Tensor(name, w.shape, lambda w=w: w * np.float32(factor)) for name, w in VALUES.items()]
    files = [
        File(folder / f"{kind}.gguf", gguf.GGUFWriter(None, "llama"), dict.fromkeys(VALUES, kind)) for kind in KINDS
    ]
    write_gguf(files, tensors)


def snapshot(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_disk_that_fails_at_any_call_leaves_the_old_files_and_nothing_new(call, tmp_path, monkeypatch):
    """Every open, write, fsync and rename of an export in its turn; the renames come last, file by file."""
    write(tmp_path)
    before = snapshot(tmp_path)
    real, left = getattr(os, call), 0

    def failing(*arguments, **options):
        nonlocal left
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **options)
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(atomic.os, call, failing)
    for allowed in range(100):
        left = allowed
        try:
            write(tmp_path, 2.0)
            break
        except CheckpointError as error:
            assert "No space left on device" in str(error) and "nothing of it was left behind" in str(error)
        found = snapshot(tmp_path)
        if call in ("open", "write"):
            assert found == before
        assert set(found) == set(before) and all(GGUFFile(tmp_path / name).tensors for name in found)
    assert allowed >= {"open": 2, "write": 11, "fsync": 2, "replace": 2}[call]  # each of them was met
    assert snapshot(tmp_path) != before


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_gguf_faults as faults
    folder = Path(sys.argv[2])
    real = {"write": os.write, "fsync": os.fsync, "replace": os.replace}
    for at in range(100):
        if (child := os.fork()) == 0:
            left = at
            def dying(name):
                def call(*arguments):
                    global left
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                    return real[name](*arguments)
                return call
            for name in real:
                setattr(os, name, dying(name))
            faults.write(folder, 2.0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        whole = [round(float(faults.GGUFFile(folder / n).decode("blk.0.ffn_up.weight")[0, 0]), 2) for n in names]
        print(status, names, whole, len(list(folder.iterdir())), flush=True)
        if status == 0:
            break
"""


def test_a_kill_at_any_call_leaves_whole_files_and_the_next_export_clears_the_rest(tmp_path):
    """SIGKILL at every write, fsync and rename: each file is the old one or the new one, whole."""
    write(tmp_path)
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), here, tmp_path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) > 16 and [status for status, _ in lines] == ["9"] * (len(lines) - 1) + ["0"]
    names = sorted(f"{kind}.gguf" for kind in KINDS)
    assert all(rest.startswith(str(names)) for _, rest in lines)
    assert lines[0][1].startswith(f"{names} [1.0, 1.0] ") and lines[-1][1] == f"{names} [2.0, 2.0] 2"
    assert {rest[len(str(names)) + 1 :].rsplit(" ", 1)[0] for _, rest in lines} >= {"[1.0, 1.0]", "[2.0, 2.0]"}


@pytest.fixture(scope="module")
def adapter(repo, tmp_path_factory):
    """An adapter and its base, in folders of their own."""
    folder = tmp_path_factory.mktemp("sources")
    base = shutil.copytree(repo / "examples" / "tiny-base", folder / "base")
    model, _ = FastLanguageModel.from_pretrained(base, max_seq_length=32, load_in_4bit=False)
    FastLanguageModel.get_peft_model(model, r=2, target_modules=["v_proj"]).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def model(adapter):
    return FastLanguageModel.from_pretrained(adapter, max_seq_length=32, load_in_4bit=False)


def test_what_cannot_be_written_is_said_and_the_sources_are_untouched(model, adapter, tmp_path, monkeypatch):
    (model, tokenizer), sources = model, snapshot(adapter.parent)
    (tmp_path / "base-Q8_0.gguf").mkdir()  # a folder of the file's name
    with pytest.raises(CheckpointError, match="Q8_0.gguf could not be written: .*Is a directory"):
        model.save_pretrained_gguf(tmp_path, tokenizer, "q8_0", verify=False)
    real = os.open

    def read_only(path, flags, *arguments, **options):  # simulated, because root may write anywhere
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "open", read_only)
        for method in ("q8_0", "lora"):
            with pytest.raises(CheckpointError, match="could not be written: .*Read-only file system"):
                model.save_pretrained_gguf(tmp_path, tokenizer, method, verify=False)
    tokenizer.add_tokens([f"<word{i}>" for i in range(1100 - len(tokenizer))])
    with pytest.raises(CheckpointError, match="ids up to 1099, the model's embedding 1024 rows"):
        model.save_pretrained_gguf(tmp_path, tokenizer, "q8_0")
    with pytest.raises(ConfigError, match="vocabulary of 1024"):
        model.save_pretrained_gguf(tmp_path, tokenizer, "q8_0", rows=[[1024]])
    monkeypatch.setattr(model.decoder, "config", replace(model.decoder.config, model_type="mamba"))
    for method in ("q8_0", "lora"):
        with pytest.raises(CheckpointError, match="model_type='mamba' cannot be written"):
            model.save_pretrained_gguf(tmp_path, tokenizer, method)
    assert [p.name for p in tmp_path.rglob("*")] == ["base-Q8_0.gguf"] and snapshot(adapter.parent) == sources


def test_an_adapter_whose_base_is_gone_is_not_exported(adapter, tmp_path, capsys):
    lost = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/none/base"}))
    arguments = ["--adapter", str(lost), "--to", "gguf:q8_0", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "the base of adapter" in capsys.readouterr().err and not (tmp_path / "out").exists()
