"""benchmarks/plot.py: which records it takes, and that it draws them where matplotlib is installed."""

import json
import runpy
import sys

import pytest
from test_bench_command import NUMBERS

STEP = {"device": "NVIDIA H200", "model": "llama-3.1-8b", "policy": "none", "batch": 2, "seq": 4096, "packed": False}
TIMES = {"microseconds": 10.0, "range": [9.0, 11.0], "share_of_bound": 0.8}
KERNEL = {"device": "NVIDIA H200", "case": "nf4/8192x4096", "kernel": TIMES, "reference": TIMES}


def _records(tmp_path):
    later = STEP | NUMBERS | {"tokens_per_second": 15000.0, "peak_memory_bytes": None}
    rows = [STEP | NUMBERS, STEP | {"error": "the device's memory is full"}, later]
    rows += [KERNEL, KERNEL | {"case": "nf4/broken", "kernel": {"error": "no"}}]
    rows.append(KERNEL | {"case": "nf4/reference_fails", "reference": {"error": "no room"}})
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_record_of_a_run_counts_and_failed_ones_do_not(repo, tmp_path):
    plot = runpy.run_path(str(repo / "benchmarks" / "plot.py"))
    steps, kernels = plot["read"]([_records(tmp_path)])
    assert [step["tokens_per_second"] for step in steps] == [15000.0]
    assert plot["memory_gib"](steps[0]) == 33  # the compiler's count stands in for a peak that is not there
    assert [kernel["case"] for kernel in kernels] == ["nf4/8192x4096", "nf4/reference_fails"]


def test_plots_are_drawn(repo, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(_records(tmp_path)), "--out", str(tmp_path / "plots")])
    runpy.run_path(str(repo / "benchmarks" / "plot.py"), run_name="__main__")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "steps-nvidia-h200.png",
        "kernels-nvidia-h200.png",
    }
