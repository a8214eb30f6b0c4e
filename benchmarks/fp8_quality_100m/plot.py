"""The curves of the records: held-out loss against step in every arm and seed, and fp8's distance from bf16.

Needs matplotlib: pip install "fastft-jax[plot]".
"""

import json
from pathlib import Path

COLOURS = {"bf16": "tab:blue", "fp8": "tab:orange"}
KEPT = "tab:green"  # an arm with a linear kept in bf16


def read(path: Path) -> dict[tuple[str, int, int], list[list[float]]]:
    """{(arm, adapter seed, data seed): [[step, held-out loss]]}; of several records of one run, the last."""
    runs = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["stage"] == "finetune":
            runs[record["arm"], record["adapter_seed"], record["data_seed"]] = record["held_out_losses"]
    return runs


def draw(records: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = read(records)
    figure, (curves, differences) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = dict(zip(sorted({data for _, _, data in runs}), ("-", "--", ":", "-."), strict=False))
    for (arm, adapter, data), losses in runs.items():
        if adapter != data:
            continue
        look = {"color": COLOURS.get(arm, KEPT), "linestyle": styles.get(data, "-"), "linewidth": 1.2}
        steps, values = zip(*losses, strict=True)
        curves.plot(steps, values, label=f"{arm}, seed {data}", **look)
        if arm != "bf16":
            against = [value for _, value in runs["bf16", data, data]]
            gaps = [a - b for a, b in zip(values, against, strict=True)]
            differences.plot(steps, gaps, label=f"{arm} - bf16, seed {data}", **look)
    for (arm, adapter, data), losses in runs.items():
        if adapter != data:  # what another start of the adapter does, for comparison
            gaps = [a - b for (_, a), (_, b) in zip(losses, runs[arm, data, data], strict=True)]
            look = {"color": "gray", "linewidth": 1.2}
            differences.plot([step for step, _ in losses], gaps, label=f"{arm}, another adapter - {arm}", **look)
    differences.axhline(0, color="gray", linewidth=0.6)
    curves.set(xlabel="step", ylabel="held-out loss")
    differences.set(xlabel="step", ylabel="difference of held-out losses")
    for axes in (curves, differences):
        axes.legend(fontsize=7)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
