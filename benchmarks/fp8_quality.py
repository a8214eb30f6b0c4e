"""Does training in fp8 end where training without it ends? The quickstart, several seeds each way, held-out loss.

    python benchmarks/fp8_quality.py [--seeds 1 2 3] [--out benchmarks/fp8_quality.jsonl]

Runs on any machine: on a CPU fp8 is emulated, with the same rounding. The base is a tiny trained model, and so are the
conclusions: see docs/performance.md.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from fastft_jax.trainers.environment import environment

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "fp8_quality.jsonl")
    arguments = parser.parse_args()
    facts = environment(jax.local_devices()[0])
    common = {"date": datetime.date.today().isoformat(), "device": facts["device"], "packages": facts["packages"]}
    for seed in arguments.seeds:
        for compute in ("null", "fp8"):
            record = common | {
                "seed": seed,
                "compute_dtype": None if compute == "null" else compute,
                **run(seed, compute),
            }
            print(
                json.dumps({k: record[k] for k in ("seed", "compute_dtype", "eval_losses", "train_losses")}), flush=True
            )
            with arguments.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


def run(seed: int, compute: str) -> dict:
    """One quickstart with a seed for the adapter's start and the data's order; losses after each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "training.seed": seed,
            "lora.random_state": seed,
            "model.compute_dtype": compute,
            "training.output_dir": folder,
            "training.eval_strategy": "epoch",
            "training.exact_match_rows": 0,
        }
        command = [sys.executable, "-m", "fastft_jax.sft", "--config", "configs/quickstart.yaml"]
        command += [f"{key}={value}" for key, value in options.items()]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {
        "eval_losses": [round(row["eval_loss"], 5) for row in rows if "eval_loss" in row],
        "train_losses": [round(row["loss"], 5) for row in rows if "loss" in row][-3:],
    }


if __name__ == "__main__":
    main()
