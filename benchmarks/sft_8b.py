"""Measures QLoRA training of Llama-3.1-8B's geometry through the command line, and appends a JSON line a run.

    python benchmarks/sft_8b.py [--policies full none] [--packed] [--work DIR] [--out benchmarks/sft_8b.jsonl]

Random weights (scripts/make_random_checkpoint.py) and random text, so nothing is downloaded; every position holds a
token and every label but a document's first is trained. A row is one document, with --packed several of 100 to 2,000
tokens. The first WARM_UP steps are left out of the figures.
"""

import argparse
import datetime
import json
import random
import re
import statistics
import string
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "benchmarks" / "sft_8b.yaml"
ROWS, LENGTH, WARM_UP = 40, 4096, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", nargs="+", default=["full"])
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "bench")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "sft_8b.jsonl")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--like", default="llama-3.1-8b")
    parser.add_argument("--set", nargs="*", default=[], help="further section.key=value overrides")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    model, text = work / f"{arguments.like}-random", work / "text.jsonl"
    if not model.exists():
        start = time.perf_counter()
        script = ROOT / "scripts" / "make_random_checkpoint.py"
        subprocess.run([sys.executable, script, "--like", arguments.like, model], check=True)
        print(f"wrote {model} in {time.perf_counter() - start:.0f} s", flush=True)
    generator = random.Random(0)
    letters = string.ascii_letters + string.digits + " "
    with text.open("w") as file:
        for _ in range(4 * ROWS if arguments.packed else ROWS):
            length = generator.randint(100, 2000) if arguments.packed else LENGTH
            file.write(json.dumps({"text": "".join(generator.choices(letters, k=length - 1))}) + "\n")
    for policy in arguments.policies:
        packing = ["data.packing=true"] if arguments.packed else []
        result = measure(policy, model, text, work / f"run-{policy}", arguments.set + packing)
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result, indent=1), flush=True)


def measure(policy: str, model: Path, text: Path, output: Path, overrides: list[str]) -> dict:
    """One run of the command line: its wall time, loading time, step times and peak memory."""
    options = [f"model.model_name={model}", f"data.path={text}", f"training.output_dir={output}", *overrides]
    options.append(f"lora.use_gradient_checkpointing={policy}")
    command = [sys.executable, "-m", "fastft_jax.sft", "--config", str(CONFIG), *options]
    start, first_step, lines = time.perf_counter(), None, []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
        if first_step is None and line.startswith("step "):
            first_step = time.perf_counter() - start
    if process.wait() != 0:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    log = "".join(lines)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steady = [row for row in rows if row["step"] > WARM_UP]
    seconds = [row["seconds"] for row in steady]
    speeds = [row["tokens"] / row["seconds"] for row in steady]
    environment = json.loads((output / "run.json").read_text())["environment"]
    return {
        "date": datetime.date.today().isoformat(),
        "device": environment["device"],
        "driver": environment.get("driver"),
        "packages": environment["packages"],
        "command": "python -m fastft_jax.sft --config benchmarks/sft_8b.yaml "
        + " ".join([*overrides, f"lora.use_gradient_checkpointing={policy}"]),
        "policy": policy,
        "tokens_per_step": steady[-1]["tokens"],
        "steps": len(steady),
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "milliseconds_per_step": round(1000 * statistics.median(seconds), 1),
        "mfu": steady[-1].get("mfu"),
        "peak_memory_gb": round(max(row.get("peak_memory_bytes", 0) for row in rows) / 1e9, 3),
        "program_gib": _number(r"the step needs ([\d.]+) GiB", log),
        "load_seconds": _number(r"loaded .* in ([\d.]+) s", log),
        "compile_seconds": _number(r"compiled in ([\d.]+) s", log),
        "start_to_first_step_seconds": round(first_step, 1),
        "losses": [round(row["loss"], 4) for row in rows],
    }


def _number(pattern: str, text: str) -> float | None:
    found = re.search(pattern, text)
    return float(found[1]) if found else None


if __name__ == "__main__":
    main()
