"""What a run prints and records: the step's line, metrics.jsonl across a resume, trackers, and what it ran on."""

import io
import json
import math
import subprocess
import sys
import types

import pytest

from fastft_jax.errors import ConfigError
from fastft_jax.trainers.environment import (
    device_peak_flops,
    environment,
    environment_lines,
    memory_in_use,
    peak_memory,
    write_run_file,
)
from fastft_jax.trainers.report import Reporter, eval_line, step_line

STEP = {"epoch": 0.5, "loss": 1.25, "learning_rate": 2e-4, "grad_norm": 0.5, "tokens": 8192, "seconds": 0.5}


class Card:
    """A device as jax describes an H200."""

    device_kind, platform = "NVIDIA H200", "gpu"

    def memory_stats(self):
        return {"bytes_in_use": 2**30, "peak_bytes_in_use": int(8.2 * 2**30), "bytes_limit": 140 * 2**30}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_step_line_reads_as_designed():
    line = step_line(
        120,
        1000,
        loss=1.2341,
        learning_rate=2e-4,
        grad_norm=0.5213,
        tokens_per_second=16412,
        mfu=0.611,
        memory=int(8.2 * 2**30),
    )
    assert line == "step 00120 (12.0%) | loss 1.234 | lr 2.0e-4 | grad_norm 0.52 | 16.4k tok/s | mfu 61% | mem 8.2 GiB"


def test_what_is_not_known_is_left_out_of_the_lines():
    line = step_line(3, 3, loss=0.5, learning_rate=0.0, grad_norm=12.0, tokens_per_second=853.4)
    assert line == "step 00003 (100.0%) | loss 0.500 | lr 0 | grad_norm 12.00 | 853 tok/s"
    assert eval_line(1, 2, loss=math.log(3.5)) == "step 00001 (50.0%) | eval_loss 1.253 | perplexity 3.50"
    assert eval_line(1, 2, loss=1000.0, token_accuracy=0.625).endswith("perplexity inf | token_accuracy 62.5%")


def test_a_step_is_printed_and_recorded_with_speed_mfu_and_memory(tmp_path):
    out = io.StringIO()
    with Reporter(tmp_path, total_steps=4, device=Card(), stream=out) as reporter:
        # 989e12 FLOP/s x 0.5 s x 60% = 296.7e12 FLOPs
        reporter.step(1, **STEP, flops=296.7e12, trained_tokens=4000)
        reporter.evaluation(1, epoch=0.5, loss=2.0, token_accuracy=0.25)
    assert out.getvalue().splitlines() == [
        "step 00001 (25.0%) | loss 1.250 | lr 2.0e-4 | grad_norm 0.50 | 16.4k tok/s | mfu 60% | mem 8.2 GiB",
        "step 00001 (25.0%) | eval_loss 2.000 | perplexity 7.39 | token_accuracy 25.0%",
    ]
    train, evaluation = _rows(tmp_path)
    assert train == {**STEP, "step": 1, "tokens_per_second": 16384.0, "mfu": 0.6, "trained_tokens": 4000} | {
        "peak_memory_bytes": int(8.2 * 2**30)
    }
    assert evaluation == {
        "step": 1,
        "epoch": 0.5,
        "eval_loss": 2.0,
        "eval_perplexity": math.exp(2.0),
        "eval_token_accuracy": 0.25,
    }


def test_numbers_that_json_cannot_hold_are_written_as_text(tmp_path):
    with Reporter(tmp_path, total_steps=1, stream=io.StringIO()) as reporter:
        reporter.step(1, **STEP | {"grad_norm": math.nan})
        reporter.evaluation(1, epoch=1, loss=1e6)
    assert [row.get("grad_norm", row.get("eval_perplexity")) for row in _rows(tmp_path)] == ["nan", "inf"]


def test_a_resumed_run_has_no_step_twice_and_no_torn_line(tmp_path):
    with Reporter(tmp_path, total_steps=9, stream=io.StringIO()) as reporter:
        for step in (1, 2, 3, 4):
            reporter.step(step, **STEP)
        reporter.evaluation(2, epoch=1, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # killed in the middle of a write
    with Reporter(tmp_path, total_steps=9, resumed_step=2, stream=io.StringIO()) as reporter:
        reporter.step(3, **STEP)
    assert [(row["step"], "loss" in row) for row in _rows(tmp_path)] == [(1, True), (2, True), (2, False), (3, True)]
    with Reporter(tmp_path, total_steps=9, stream=io.StringIO()):
        pass
    assert _rows(tmp_path) == []


def test_on_a_terminal_lines_stand_above_a_bar_and_elsewhere_there_is_none(tmp_path):
    screen, file = Terminal(), io.StringIO()
    for stream in (screen, file):
        with Reporter(tmp_path, total_steps=2, stream=stream) as reporter:
            assert reporter.is_terminal == (stream is screen)
            reporter.say("[bold]a sample of [/INST] text")
            reporter.step(1, **STEP)
            reporter.advance(2)
    assert "2/2" in screen.getvalue() and "[bold]a sample of [/INST] text" in screen.getvalue()
    assert file.getvalue().splitlines()[0] == "[bold]a sample of [/INST] text"
    assert "\x1b" not in file.getvalue()


def test_tensorboard_reads_what_was_written_and_forgets_what_a_resume_supersedes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Reporter(
            tmp_path, total_steps=4, report_to=["tensorboard"], resumed_step=resumed, stream=io.StringIO()
        ) as reporter:
            for step in steps:
                reporter.step(step, **STEP | {"loss": step + resumed / 10})
            reporter.evaluation(steps[-1], epoch=1, loss=0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(e.step, round(e.value, 3)) for e in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]
    assert [e.step for e in events.Scalars("eval_loss")] == [4]
    assert {"learning_rate", "grad_norm", "tokens_per_second"} <= set(events.Tags()["scalars"])


def test_reporting_imports_neither_torch_nor_tensorflow(tmp_path):
    code = f"""
import sys
from fastft_jax.trainers.report import Reporter
with Reporter({str(tmp_path)!r}, total_steps=1, report_to=["tensorboard"]) as reporter:
    reporter.step(1, **{STEP!r})
print([name for name in ("torch", "tensorflow", "jax") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, name):
    for module in [m for m in sys.modules if m.split(".")[0] == name] + [name]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf'report_to: {name} is not installed .* pip install "fastft-jax\[tracking\]"'
    ):
        Reporter(tmp_path, total_steps=1, report_to=[name], stream=io.StringIO())


def _fake_wandb(calls):
    def init(**options):
        calls.append(("init", options))
        run = types.SimpleNamespace(id=options.get("id", "run-1"))
        run.log = lambda numbers, step: calls.append(("log", step, numbers["loss"]))
        run.finish = lambda: calls.append(("finish",))
        return run

    return types.SimpleNamespace(init=init)


def _fake_mlflow(calls):
    def start_run(run_id=None, run_name=None):
        calls.append(("init", {"run_id": run_id, "run_name": run_name}))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "run-1"))

    return types.SimpleNamespace(
        start_run=start_run,
        log_params=lambda values: calls.append(("params", values)),
        log_metrics=lambda numbers, step: calls.append(("log", step, numbers["loss"])),
        end_run=lambda: calls.append(("finish",)),
    )


def _report_twice(folder, name):
    for resumed, step in ((0, 1), (1, 2)):
        with Reporter(
            folder,
            total_steps=2,
            report_to=[name],
            run_name="mine",
            config={"lora": {"r": 8}},
            resumed_step=resumed,
            stream=io.StringIO(),
        ) as reporter:
            reporter.step(step, **STEP)


def test_wandb_goes_on_in_the_same_run_after_a_resume(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", _fake_wandb(calls))
    _report_twice(tmp_path, "wandb")
    first = {"name": "mine", "config": {"lora": {"r": 8}}, "dir": str(tmp_path)}
    assert calls == [
        ("init", first),
        ("log", 1, 1.25),
        ("finish",),
        ("init", {**first, "id": "run-1", "resume": "allow"}),
        ("log", 2, 1.25),
        ("finish",),
    ]


def test_mlflow_goes_on_in_the_same_run_after_a_resume(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "mlflow", _fake_mlflow(calls))
    _report_twice(tmp_path, "mlflow")
    assert calls == [
        ("init", {"run_id": None, "run_name": "mine"}),
        ("params", {"lora.r": "8"}),
        ("log", 1, 1.25),
        ("finish",),
        ("init", {"run_id": "run-1", "run_name": None}),
        ("log", 2, 1.25),
        ("finish",),
    ]


def test_a_tracker_that_fails_is_dropped_with_a_word_and_the_run_goes_on(tmp_path, monkeypatch):
    wandb = _fake_wandb([])
    run = wandb.init()
    run.log = lambda *_, **__: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    out = io.StringIO()
    with Reporter(tmp_path, total_steps=2, report_to=["wandb"], stream=out) as reporter:
        reporter.step(1, **STEP)
        reporter.step(2, **STEP)
    assert out.getvalue().count("warning: wandb failed and is not written to any more: division by zero") == 1
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_peak_of_known_cards_is_the_data_sheets(kind, tera):
    assert device_peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "Tesla T4", "NVIDIA H2000 Imaginary", ""])
def test_an_unknown_device_has_no_peak(kind):
    assert device_peak_flops(kind) is None


def test_memory_is_the_backends_count_or_nothing():
    import jax

    assert (memory_in_use(Card()), peak_memory(Card())) == (2**30, int(8.2 * 2**30))
    assert memory_in_use(jax.devices("cpu")[0]) is peak_memory(None) is None


def test_the_environment_names_versions_python_and_device(tmp_path):
    import jax

    facts = environment(jax.devices("cpu")[0])
    assert facts["packages"]["jax"] == jax.__version__
    assert facts["device"] == "cpu"
    assert f"jax {jax.__version__} " in environment_lines(facts)[1]
    path = write_run_file(tmp_path / "run", {"environment": facts, "config": {"lora": {"r": 8}}})
    assert json.loads(path.read_text())["environment"] == facts
    assert environment_lines(environment(Card()))[2].startswith("device NVIDIA H200, 140.0 GiB")
