"""`python -m fastft_jax.bench`: what it prints and records, on a CPU, where a GPU's numbers are dashes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from test_bench_step import TINY

from fastft_jax.bench import kernels, record
from fastft_jax.bench.__main__ import main
from fastft_jax.bench.profile import Speeds
from fastft_jax.bench.trace import read_events
from fastft_jax.pallas_kernels.case import Case
from fastft_jax.trainers.compile import compiler_options


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")  # main sets defaults for its process
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_a_sweep_prints_a_line_and_records_a_line_a_run_with_its_profile(config, tmp_path, capsys, xla_cache):
    out, traces = tmp_path / "new" / "runs.jsonl", tmp_path / "traces"
    small = ["--config", config, "--seq", "64", "--r", "4", "--dtype", "float32", "--steps", "2", "--warmup", "1"]
    small += ["--optim", "adamw"]  # compiles faster than with 8-bit moments
    assert main([*small, "--policy", "none", "full", "--trace", str(traces), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert record.HEADER in printed and "GEMM" in printed and "idle" in printed and "longest kernels:" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["policy"] for row in rows] == ["none", "full"]
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], abs=1e-3) and len(rows[0]["losses"]) == 3
    for row in rows:
        low, high = row["tokens_per_second_range"]
        assert 0 < low <= row["tokens_per_second"] <= high
        assert row["tokens_per_step"] == 128 and row["compile_seconds"] > 0 and row["program_bytes"] > 0
        assert (row["mfu"], row["peak_memory_bytes"], row["power_limit_watts"]) == (None, None, None)
        assert row["command"].startswith(f"python -m fastft_jax.bench --config {config}")
        assert {"date", "device", "driver", "packages"} <= row.keys()
        classes = row["profile"]["classes"]
        assert {"GEMM", "attention", "norm/rope/glu", "loss", "optimizer"} <= classes.keys()
        assert all(entry["bound"] is None for entry in classes.values())  # a CPU's speeds are not known
    phases = ["imports", "device", "weights", "adapter", "state", "trace", "compile", "first_step"]
    assert list(rows[0]["start_seconds"]) == phases and "start_seconds" not in rows[1]
    assert sum(rows[0]["start_seconds"].values()) == pytest.approx(rows[0]["start_to_first_step_seconds"], abs=0.1)
    assert rows[0]["start_programs"]["count"] <= 12 and "start, s: imports" in printed
    assert rows[0]["start_to_first_step_seconds"] > 0 and rows[1]["start_to_first_step_seconds"] is None
    assert read_events(traces / "none-2x64") and read_events(traces / "full-2x64")


def test_help_is_quick_and_wrong_options_are_one_line(config, tmp_path, capsys):
    code = "import sys; from fastft_jax.bench.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: "
    code += "print('heavy:', [n for n in ('jax', 'numpy', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--like" in done.stdout and "heavy: []" in done.stdout
    small = ["--config", config, "--seq", "8", "--r", "4"]
    for wrong, said in (
        (["--policy", "sometimes"], "sometimes"),
        (["--policy", '{"queries": "save"}'], "queries"),
        (["--policy", "{q: save"], "JSON"),
        (["--compute-dtype", "int3"], "compute"),
        (["--dtype", "int8"], "--dtype"),
        (["--config", str(tmp_path / "none.json")], "none.json"),
    ):
        assert main([*small, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_run_that_does_not_fit_is_recorded_and_the_others_go_on(config, tmp_path, capsys, monkeypatch):
    from fastft_jax.bench.measure import Bench

    def run(self, work, **_):
        if work.batch == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate")
        return {"policy": work.policy, "batch": work.batch, "seq": work.seq, **NUMBERS}, None

    monkeypatch.setattr(Bench, "run", run)
    out = tmp_path / "runs.jsonl"
    options = [
        "--config",
        config,
        "--batch",
        "1",
        "2",
        "--seq",
        "8",
        "--r",
        "4",
        "--dtype",
        "float32",
        "--out",
        str(out),
    ]
    assert main([*options, "--policy", "none"]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("error") for row in rows] == ["the device's memory is full", None]
    assert "memory is full" in capsys.readouterr().out


NUMBERS = {
    "tokens_per_second": 14000.0,
    "tokens_per_second_range": [13900.0, 14100.0],
    "milliseconds_per_step": 585.1,
    "mfu": 0.501,
    "peak_memory_bytes": 35 * 2**30,
    "program_bytes": 33 * 2**30,
    "compile_seconds": 8.2,
}


def test_a_second_process_finds_all_it_compiles_on_disk(config, tmp_path):
    options = ["--config", config, "--seq", "8", "--r", "4", "--steps", "1", "--warmup", "1", "--policy", "full"]
    options += ["--optim", "sgd", "--compile-cache", str(tmp_path / "xla"), "--out", str(tmp_path / "runs.jsonl")]
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "fastft_jax.bench", *options], check=True, capture_output=True)
    first, second = (json.loads(row)["start_programs"] for row in (tmp_path / "runs.jsonl").read_text().splitlines())
    assert first["from_cache"] == 0 and first["count"] == second["count"] == second["from_cache"]


def test_a_profile_is_taken_without_cuda_graphs():
    for policy in ("offload", "none"):
        with_graphs, without = (compiler_options(policy, "gpu", cuda_graphs=on) for on in (True, False))
        assert without == with_graphs | {"xla_gpu_enable_command_buffer": ""}
    assert compiler_options("none", "cpu", cuda_graphs=False) == {}


def test_a_line_shows_what_is_known():
    run = {"policy": "none", "batch": 2, "seq": 4096, "start_to_first_step_seconds": None, **NUMBERS}
    assert record.line(run).split() == "none 2 4096 14,000 13,900-14,100 585.1 50.1% 35.00 33.00 8.2 -".split()
    assert len(record.line(run)) == len(record.HEADER)


def double(x, interpret=None):
    return 2 * x


def failing(x, interpret=None):
    raise ValueError("this card cannot\nsecond line")


X = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def test_a_kernel_is_timed_compared_and_held_against_its_bound(capsys):
    case = Case("double/64x64", double, lambda x: x + x, (X,), bytes=2 * 64 * 64 * 4, flops=1000)
    measured = kernels.measure(case, Speeds(peak=1e9, copy=1e9), calls=3)
    assert measured["bound_microseconds"] == pytest.approx(1e6 * 2 * 64 * 64 * 4 / 1e9, rel=1e-3)
    assert measured["kernel"]["microseconds"] > 0 and measured["reference"]["share_of_bound"] > 0
    assert measured["difference"] == 0
    assert kernels.line(measured).startswith("double/64x64")
    assert kernels.measure(case, Speeds(), calls=1)["bound_microseconds"] is None
    wrong = kernels.measure(Case("off", double, lambda x: x + x + 1, (X,), bytes=1), Speeds(), calls=1)
    assert 0.1 < wrong["difference"] < 2


def test_a_kernel_that_fails_does_not_end_the_others(config, tmp_path, capsys, monkeypatch):
    module = type(sys)("fastft_jax.pallas_kernels.rms_norm.cases")
    module.CASES = (
        Case("rms_norm/broken", failing, double, (X,), bytes=1),
        Case("rms_norm/good", double, double, (X, X)[:1], bytes=1),
        Case("rms_norm/left_out", double, double, (X,), bytes=1),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(kernels, "PACKAGES", ("no_such_op", "rms_norm"))
    out = tmp_path / "kernels.jsonl"
    assert main(["--kernels", "broken", "good", "--out", str(out)]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["rms_norm/broken", "rms_norm/good"]
    assert rows[0]["kernel"] == {"error": "this card cannot"} and rows[1]["difference"] == 0
    assert "this card cannot" in capsys.readouterr().out


def test_operands_are_drawn_by_dtype_or_by_the_case():
    shapes = (jax.ShapeDtypeStruct((50,), jnp.bfloat16), jax.ShapeDtypeStruct((500,), jnp.uint8))
    x, codes = kernels.draw(Case("c", double, double, shapes, bytes=1), 0)
    assert x.dtype == jnp.bfloat16 and 0.5 < float(jnp.std(x)) < 2
    assert codes.dtype == jnp.uint8 and int(codes.max()) > 200
    with pytest.raises(ValueError, match="int32"):
        kernels.draw(Case("c", double, double, (jax.ShapeDtypeStruct((2,), jnp.int32),), bytes=1), 0)
    own = Case("c", double, double, shapes, bytes=1, draw=lambda seed: (jnp.full(3, seed),))
    assert kernels.draw(own, 7)[0].tolist() == [7, 7, 7]


def test_the_cases_of_every_package_have_names_of_their_own():
    names = [case.name for case in kernels.cases()]
    assert len(names) == len(set(names))
    assert all(case.bytes > 0 and case.args for case in kernels.cases())
