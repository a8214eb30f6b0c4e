"""Do XLA's GPU options change the 8B training step? Times the product's own step under each, in one process.

    python benchmarks/xla_options.py MODEL_FOLDER [--out benchmarks/xla_options.jsonl]

MODEL_FOLDER is what `python scripts/make_random_checkpoint.py --like llama-3.1-8b MODEL_FOLDER` writes.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
import jax  # noqa: E402

from fastft_jax import FastLanguageModel, SFTTrainer  # noqa: E402
from fastft_jax.config import load_config  # noqa: E402
from fastft_jax.trainers.compile import program_bytes  # noqa: E402
from fastft_jax.trainers.environment import environment  # noqa: E402
from fastft_jax.trainers.step import make_train_step  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
HIDING = {"xla_gpu_enable_latency_hiding_scheduler": True}
SLICES = {"xla_gpu_enable_dynamic_slice_fusion": True}
NO_TRITON_GEMM = {"xla_gpu_enable_triton_gemm": False}
VARIANTS = [
    *(("none", options) for options in ({}, SLICES, HIDING, NO_TRITON_GEMM)),
    *(("offload", options) for options in ({}, HIDING, HIDING | SLICES)),
    *(("full", options) for options in ({}, SLICES)),
]
STEPS, WARM_UP = 9, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "xla_options.jsonl")
    arguments = parser.parse_args()
    config, _ = load_config(ROOT / "benchmarks" / "sft_8b.yaml", [f"model.model_name={arguments.model}"])
    model, tokenizer = FastLanguageModel.from_pretrained(**config.model.model_dump())
    FastLanguageModel.get_peft_model(model, **config.lora.model_dump())
    rows = [{"text": "abcdefgh" * 511 + "abcdefg"}] * 8  # 4095 bytes and the end-of-text token: a full row
    with tempfile.TemporaryDirectory() as folder:
        loop = SFTTrainer(model, tokenizer, rows, args=config.training.model_copy(update={"output_dir": folder})).loop
    facts = environment(jax.local_devices()[0])
    for policy, options in VARIANTS:
        record = {"date": datetime.date.today().isoformat(), "device": facts["device"], "driver": facts.get("driver")}
        record |= {
            "packages": facts["packages"],
            "policy": policy,
            "options": options,
            **measure(loop, policy, options),
        }
        print(json.dumps(record), flush=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def measure(loop, policy: str, options: dict) -> dict:
    """Median and range of tokens per second, and the compiler's count of memory."""
    batch = loop._device_batch(loop.train_source.batch(0, 0))
    step = make_train_step(loop._definition, loop.optimizer, loop._options(policy, loop.train_source))
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(loop.trainable, loop.opt_state, loop._frozen, batch, None)
    compiled = lowered.compile(compiler_options=options)
    speeds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loop.trainable, loop.opt_state, metrics = compiled(loop.trainable, loop.opt_state, loop._frozen, batch, None)
        float(metrics["loss"])
        speeds.append(batch["labels"].size / (time.perf_counter() - start))
    speeds = speeds[WARM_UP:]
    return {
        "tokens_per_second": round(statistics.median(speeds)),
        "tokens_per_second_range": [round(min(speeds)), round(max(speeds))],
        "program_gib": round(program_bytes(compiled) / 2**30, 2),
    }


if __name__ == "__main__":
    main()
