"""Fixtures every test may use."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]

# XLA's newer fusion emitters take most of the time in which it compiles a tiny model for the CPU; what came before them
# computes the same sums. Before jax starts, and for the processes that the tests start too.
QUICK_FUSIONS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
if QUICK_FUSIONS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FUSIONS}".strip()


def pytest_collection_finish():
    """What importing made (torch, transformers, jax: a million objects) stays, so the collector need not walk it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure():
    gc.unfreeze()  # else nanobind reports at exit what was never collected


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inputs that live beside a developer's checkout; a user's clone has none, so tests that want them skip."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data, tmp_path_factory):
    """`stories("bfloat16")`: the trained tiny Llama of the shared data, as a Hugging Face folder of that dtype."""
    folders: dict[str, Path] = {}

    def convert(dtype: str = "float32") -> Path:
        if dtype not in folders:
            source, out = shared_data / "stories260K", tmp_path_factory.mktemp("stories") / dtype
            tool = shared_data.parent / "tools" / "llama2c_to_hf.py"
            command = [sys.executable, tool, source / "stories260K.bin", source / "tok512.bin", out, "--dtype", dtype]
            subprocess.run(command, check=True, capture_output=True)
            folders[dtype] = out
        return folders[dtype]

    return convert


class Ran(NamedTuple):
    """What a command line said and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def xla_cache(tmp_path_factory) -> Path:
    """Compiled programs shared by the tests of a process, and with processes that they start."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
        # A tiny model's step compiles in less than jax's one second; a single operation is not worth a file
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return Path(jax.config.jax_compilation_cache_dir)


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose time goes into compiling programs that run for milliseconds; their tolerances are wide enough.

    Not where sums are compared bit for bit between programs or processes, nor for interpreted kernels with large
    blocks or real training runs, which take longer without LLVM's passes than these do to run.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run_config(repo, tmp_path):
    """`run_config({"lora": {"r": 8}})` writes a small run's YAML with these changes; a value of ... takes a key out.

    The model and the data are those of the quick start; the output folder is `tmp_path / "out"`.
    """

    def write(changes: dict | None = None) -> str:
        sections = {
            "model": {"model_name": str(repo / "examples" / "tiny-base"), "max_seq_length": 128},
            "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
            "data": {
                "path": str(repo / "examples" / "data" / "quickstart_train.jsonl"),
                "split": "train[:24]",
                "packing": True,
                "train_on_responses_only": True,
            },
            "training": {
                "output_dir": str(tmp_path / "out"),
                "max_steps": 3,
                "learning_rate": 4e-3,
                "optim": "adamw",
                "save_strategy": "no",
            },
        }
        for section, options in (changes or {}).items():
            merged = sections.get(section, {}) | options
            sections[section] = {key: value for key, value in merged.items() if value is not ...}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(sections))
        return str(path)

    return write


@pytest.fixture
def cli(capsys, monkeypatch, xla_cache):
    """`cli("--config", path, ...)` runs the command line in this process."""
    from fastft_jax.sft import main

    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "TF_CPP_MIN_LOG_LEVEL", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "0.93" if name.startswith("XLA") else "2")  # main sets defaults for its process
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse
            code = error.code
        return Ran(code, *capsys.readouterr())

    return run
