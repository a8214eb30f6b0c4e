"""Draws the records of `python -m fastft_jax.bench`: steps (speed over memory) and kernels (share of their bound).

    python benchmarks/plot.py runs.jsonl kernels.jsonl [--out plots]

Needs matplotlib: pip install "fastft-jax[plot]".
"""

import argparse
import json
from pathlib import Path


def read(paths: list[Path]) -> tuple[list[dict], list[dict]]:
    """(steps, kernels) that ran; of several records of one thing on one card, the last."""
    steps, kernels = {}, {}
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if "case" in record:
                if "error" not in record["kernel"]:
                    kernels[record["device"], record["case"]] = record
            elif "tokens_per_second" in record:
                keys = ("device", "model", "policy", "batch", "seq", "packed", "compute_dtype")
                steps[tuple(str(record.get(key)) for key in keys)] = record
    return list(steps.values()), list(kernels.values())


def memory_gib(step: dict) -> float:
    """The allocator's peak, or the compiler's count for a run that has none of its own."""
    return (step["peak_memory_bytes"] or step["program_bytes"]) / 2**30


def draw_steps(axes, steps: list[dict]) -> None:
    for policy in dict.fromkeys(str(step["policy"]) for step in steps):
        chosen = [step for step in steps if str(step["policy"]) == policy]
        axes.scatter([memory_gib(s) for s in chosen], [s["tokens_per_second"] for s in chosen], label=policy)
        for step in chosen:
            at = (memory_gib(step), step["tokens_per_second"])
            axes.annotate(f"{step['batch']}x{step['seq']}", at, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="peak memory (GiB)", ylabel="tokens/s", xlim=(0, None), ylim=(0, None))
    axes.legend(title="recomputation")


def draw_kernels(axes, kernels: list[dict]) -> None:
    """Bars: the share of the bound where there is one, for the kernel and its XLA reference."""
    shown = [kernel for kernel in kernels if kernel["kernel"]["share_of_bound"] is not None][::-1]
    for offset, name, label in ((0.2, "kernel", "kernel"), (-0.2, "reference", "XLA")):
        values = [100 * kernel[name].get("share_of_bound", 0) for kernel in shown]
        axes.barh([i + offset for i in range(len(shown))], values, height=0.4, label=label)
    axes.set_yticks(range(len(shown)), [kernel["case"] for kernel in shown], fontsize=7)
    axes.axvline(100, color="gray", linewidth=0.8)
    axes.set(xlabel="% of the bound")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("plots"))
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, kernels = read(arguments.records)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, draw, records, height in (
        ("steps", draw_steps, steps, 5),
        ("kernels", draw_kernels, kernels, 1.5 + 0.3 * len(kernels)),
    ):
        for device in dict.fromkeys(record["device"] for record in records):
            figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
            draw(axes, [record for record in records if record["device"] == device])
            axes.set_title(device)
            path = arguments.out / f"{name}-{device.lower().replace(' ', '-')}.png"
            figure.savefig(path, dpi=150)
            print(path)


if __name__ == "__main__":
    main()
