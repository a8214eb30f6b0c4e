"""A run that was stopped at any moment and resumed ends with the bytes of one that was not (on a CPU)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import yaml

from fastft_jax.errors import ConfigError, TrainingError

WEIGHTS = "adapter_model.safetensors"
ROWS = tiny_run.rows(27, longest=16)
# r=64 makes matrices of 4096 numbers, from which on Adam's moments are 8-bit
LORA = {"r": 64, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.2}
TRAINING = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "packing": True,
    "optim": "adamw_8bit",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
}
STEPS = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory, xla_cache):
    return tiny_run.save_base(tmp_path_factory.mktemp("base"))


def make(base, folder, *, rows=ROWS, lora=None, in_4bit=False, max_seq_length=tiny_run.MAX_LENGTH, **options):
    model = tiny_run.load(base, in_4bit=in_4bit, **(LORA | (lora or {})))
    model.max_seq_length = max_seq_length
    return tiny_run.trainer(model, folder, rows, **(TRAINING | {"max_steps": STEPS} | options))


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    trainer = make(base, folder)
    dtypes = {str(leaf.dtype) for leaf in _leaves(trainer.loop.opt_state)}
    assert "uint8" in dtypes and 3 < trainer.loop.steps_per_epoch < STEPS  # 8-bit moments, an epoch ends on the way
    assert trainer.train().global_step == STEPS
    assert _checkpoints(folder) == {3, 6, 7}
    return folder


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def _checkpoints(folder: Path) -> set[int]:
    found = {path.name for path in folder.iterdir() if path.name.startswith("checkpoint-")}
    assert all(re.fullmatch(r"checkpoint-\d+", name) for name in found), found  # nothing half-written is left
    return {int(name.removeprefix("checkpoint-")) for name in found}


def assert_same_run(folder: Path, other: Path, first: int = 1) -> None:
    """Equal adapters to the byte; metrics of every step from `first` on once, with equal numbers."""
    assert (folder / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    same = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")
    mine, theirs = ([[row[key] for key in same] for row in tiny_run.metrics(f)] for f in (folder, other))
    assert mine == [row for row in theirs if row[0] >= first]
    assert [row[0] for row in mine] == list(range(first, len(theirs) + 1))


def killed_after(uninterrupted: Path, folder: Path, *checkpoints: int) -> Path:
    """What a kill leaves: these checkpoints, and metrics that are ahead of them, the last line torn."""
    folder.mkdir()
    for step in checkpoints:
        shutil.copytree(uninterrupted / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    lines = (uninterrupted / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines[: len(lines) - 40])
    return folder


def test_resumed_from_the_newest_checkpoint_it_ends_with_the_same_bytes(base, uninterrupted, tmp_path):
    folder = killed_after(uninterrupted, tmp_path / "out", 3)
    # how often it saves and how many it keeps may be chosen anew
    trainer = make(base, folder, save_steps=1, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert_same_run(folder, uninterrupted)
    assert _checkpoints(folder) == {6, 7}


def test_resumed_from_a_named_checkpoint_in_another_folder_too(base, uninterrupted, tmp_path):
    folder = tmp_path / "other"
    make(base, folder).train(resume_from_checkpoint=str(uninterrupted / "checkpoint-6"))
    assert_same_run(folder, uninterrupted, first=7)


def test_killed_before_its_first_checkpoint_it_begins_again(base, uninterrupted, tmp_path):
    folder = killed_after(uninterrupted, tmp_path / "out")
    (folder / "checkpoint-3.partial").mkdir()
    make(base, folder).train(resume_from_checkpoint=True)
    assert_same_run(folder, uninterrupted)


def test_resumed_when_all_steps_are_done_it_writes_the_adapter(base, uninterrupted, tmp_path):
    folder = killed_after(uninterrupted, tmp_path / "out", 6, 7)
    (folder / "metrics.jsonl").write_text((uninterrupted / "metrics.jsonl").read_text())
    make(base, folder).train(resume_from_checkpoint=True)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"learning_rate": 2e-3}, r"training\.learning_rate was 0\.001, is 0\.002"),
        ({"max_steps": 9}, r"training\.max_steps was 7, is 9"),
        ({"lora": {"lora_alpha": 7}}, r"lora\.lora_alpha was 16, is 7"),
        ({"rows": ROWS[:-1]}, r"data\.tokens was"),
        ({"max_seq_length": 48}, r"data\.max_length was 64, is 48"),
        ({"in_4bit": True}, r"model\.load_in_4bit was False, is True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_on_resume_are_an_error_that_names_them(base, uninterrupted, tmp_path, changed, named):
    folder = killed_after(uninterrupted, tmp_path / "out", 3)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match=named) as error:
        make(base, folder, **changed).train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value) and "checkpoint-3" in str(error.value)
    assert (folder / "metrics.jsonl").read_bytes() == before and _checkpoints(folder) == {3}


def test_another_runs_folder_is_not_taken_over(base, uninterrupted, tmp_path):
    folder = killed_after(uninterrupted, tmp_path / "out", 3)
    with pytest.raises(ConfigError, match="holds another run .*resume_from_checkpoint: true"):
        make(base, folder).train()
    finished = tmp_path / "finished"
    finished.mkdir()
    shutil.copy(uninterrupted / "adapter_config.json", finished)
    with pytest.raises(ConfigError, match="holds another run"):  # there is nothing to resume, only to lose
        make(base, finished).train(resume_from_checkpoint=True)


class Run:
    """`python -m fastft_jax.sft` as a process, and its standard output so far."""

    def __init__(self, config: Path, log: Path, env: dict[str, str], *overrides: str):
        self.log, self.folder = log, config.parent / "out"
        with open(log, "w") as out:
            command = [sys.executable, "-m", "fastft_jax.sft", "--config", str(config), *overrides]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=config.parent)

    def steps(self) -> list[int]:
        return [int(n) for n in re.findall(r"^step (\d+) .*\n", self.log.read_text(), re.MULTILINE)]

    def saving(self) -> bool:
        """Is there a checkpoint that is not complete?"""
        return any(not (path / "manifest.json").exists() for path in self.folder.glob("checkpoint-*.partial"))

    def freeze_when(self, condition) -> None:
        """Stop the process (SIGSTOP) at a moment when the condition holds."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ended too early:\n{self.log.read_text()}"
            if condition():
                self.process.send_signal(signal.SIGSTOP)
                time.sleep(0.02)  # until it has come to a stop
                if condition():
                    return
                self.process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        raise AssertionError(f"the moment did not come:\n{self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(60) == -signal.SIGKILL

    def ask_to_stop(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        assert self.process.wait(120) == 0, self.log.read_text()

    def finish(self) -> None:
        assert self.process.wait(240) == 0, self.log.read_text()


@pytest.fixture
def config(base, tmp_path):
    """`config(name)`: the YAML of a run that writes to tmp_path / name / out."""

    def write(name: str) -> Path:
        path = tmp_path / name / "run.yaml"
        if not path.exists():
            path.parent.mkdir()
            training = TRAINING | {"output_dir": str(path.parent / "out"), "max_steps": 18, "save_total_limit": 2}
            sections = {
                "model": {"model_name": str(base), "max_seq_length": tiny_run.MAX_LENGTH, "dtype": "float32"},
                "lora": LORA,
                "data": {"path": str(tiny_run.write_rows(tmp_path / "rows.jsonl", ROWS))},
                "training": training,
            }
            path.write_text(yaml.safe_dump(sections))
        return path

    return write


@pytest.fixture
def start(config, tmp_path, xla_cache):
    """`start(name, *overrides)`: a Run that writes to tmp_path / name / out; killed when the test ends."""
    started: list[Run] = []
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(xla_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def run(name: str, *overrides: str) -> Run:
        path = config(name)
        started.append(Run(path, path.parent / f"{len(started)}.log", env, *overrides))
        return started[-1]

    yield run
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def test_killed_and_signalled_at_several_moments_the_command_ends_with_the_same_bytes(start):
    """Each process costs seconds of imports; what a kill leaves before the first checkpoint is above."""
    whole = start("whole")
    whole.finish()
    resume = "training.resume_from_checkpoint=true"

    run = start("broken")
    run.freeze_when(lambda: run.saving() and len(run.steps()) > 3)
    run.kill()
    assert run.saving() and _complete(run.folder)  # during a save, with an older checkpoint there

    run = start("broken", resume)
    run.freeze_when(lambda: len(run.steps()) >= 2 and run.steps()[-1] not in _complete(run.folder) and not run.saving())
    run.kill()  # between two checkpoints

    for number in (signal.SIGTERM, signal.SIGINT):
        run = start("broken", resume)
        run.freeze_when(lambda run=run: run.steps())
        assert run.steps()[0] == max(_before(run)) + 1
        run.ask_to_stop(number)
        last = run.steps()[-1]
        assert last < 18 and last in _complete(run.folder)
        assert f"stopped by a signal: step {last} is saved" in run.log.read_text()
        assert not (run.folder / WEIGHTS).exists()  # an adapter that is not finished is not there

    run = start("broken", resume)
    run.finish()
    assert run.steps()[0] == last + 1
    assert_same_run(run.folder, whole.folder)
    assert (run.folder / "adapter_config.json").read_bytes() == (whole.folder / "adapter_config.json").read_bytes()
    assert _checkpoints(run.folder) == _checkpoints(whole.folder) == {15, 18}


def _complete(folder: Path) -> set[int]:
    return {
        int(path.parent.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*[0-9]/manifest.json")
    }


def _before(run: Run) -> set[int]:
    """The step that a process says it resumed from."""
    return {int(n) for n in re.findall(r"resumed from .*checkpoint-(\d+)", run.log.read_text())}
