"""Which model families are supported, what each has, and which kernels it would use on a card, and why not faster ones.

    python -m fastft_jax.families [--card h100] [--markdown] [NAME ...]
    python -m fastft_jax.families --config path/to/config.json

Nothing is downloaded and nothing runs on the card. Exit codes: 0 done, 2 a wrong option.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastft_jax.convert.hf import read_config, tensor_requests
from fastft_jax.errors import ConfigError, FastFTError
from fastft_jax.models.active_kernels import Active, Card, active_kernels
from fastft_jax.models.families.examples import EXAMPLES, Example
from fastft_jax.models.families.features import features
from fastft_jax.models.families.registry import FAMILIES, config_from_hf

CARDS = {
    "cpu": Card("cpu", None),
    "a100": Card("gpu", (8, 0)),
    "a10g": Card("gpu", (8, 6)),
    "rtx3090": Card("gpu", (8, 6)),
    "l4": Card("gpu", (8, 9)),
    "l40s": Card("gpu", (8, 9)),
    "rtx4090": Card("gpu", (8, 9)),
    "h100": Card("gpu", (9, 0)),
    "h200": Card("gpu", (9, 0)),
}

LEGEND = """packed: attention over several documents a row; decoding: products of a few new tokens with the 4-bit codes;
fp8: the option compute_dtype. A number is why it is not a faster one."""

Table = list[list[str]]  # rows of cells, the first one the heads


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastft_jax.families", description="Model families and kernels.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types (default: all)")
    parser.add_argument("--config", metavar="FILE", help="ask about the model of this config.json instead")
    parser.add_argument("--card", choices=CARDS, help="ask about this card instead of the one that is here")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # another process may be training on the card
    try:
        asked = _asked(arguments.names, arguments.config)
        label, card = (arguments.card, CARDS[arguments.card]) if arguments.card else here()
        kernels, reasons = kernel_table(asked, card)
    except FastFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show = markdown if arguments.markdown else aligned
    print(show(family_table(asked)), f"\nKernels on {label}, for a bfloat16 model with an NF4 base:\n", sep="\n")
    print(show(kernels))
    if reasons:
        print(f"\n{LEGEND}\n", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)), sep="\n")
    return 0


def here() -> tuple[str, Card]:
    """The name of JAX's default device, and what the operations ask of it."""
    import jax

    from fastft_jax.pallas_kernels.pallas import current_device

    return jax.local_devices()[0].device_kind, Card(*current_device())


def _asked(names: Sequence[str], config: str | None) -> dict[str, Example]:
    """model type -> the model to ask about. Raises ConfigError for a name or a file that there is not."""
    if config is not None:
        file = Path(config).expanduser()
        if not file.is_dir() and file.name != "config.json":
            raise ConfigError(f"--config {config}: name a model's folder, or the config.json in it")
        folder = (file if file.is_dir() else file.parent).resolve()
        values = read_config(folder)
        return {str(values.get("model_type")): Example("", folder.name, values)}
    if unknown := [name for name in names if name not in EXAMPLES]:
        raise ConfigError(f"there is no family {unknown[0]}; there are {', '.join(EXAMPLES)}")
    return {name: EXAMPLES[name] for name in names or FAMILIES}


def family_table(asked: Mapping[str, Example] = EXAMPLES) -> Table:
    """Model type, releases and features of each."""
    rows = [["model_type", "releases", "for example", "what it has"]]
    for name, example in asked.items():
        config, _ = config_from_hf(example.values)
        rows.append([name, example.releases, example.name, "; ".join(features(config))])
    return rows


def kernel_table(asked: Mapping[str, Example], card: Card) -> tuple[Table, list[str]]:
    """The implementation of every operation for each model, `triton (2)` with a reason's number; the reasons."""
    rows: Table = []
    reasons: list[str] = []
    for name, example in asked.items():
        active = kernels_of(example.values, card)
        rows = rows or [["model_type", *active]]
        for each in active.values():
            reasons += [why for why in each.why if why not in reasons]
        rows.append([name, *(_cell(each, reasons) for each in active.values())])
    return rows, reasons


def kernels_of(values: dict[str, Any], card: Card) -> dict[str, Active]:
    """What the model of a config.json would use."""
    config, _ = config_from_hf(values)
    # of experts, a layer at a time is decoded
    matrices = [(request.tensor_shape, request.lead[-1]) for request in tensor_requests(config) if request.quantisable]
    return active_kernels(config, matrices, card)


def _cell(active: Active, reasons: list[str]) -> str:
    numbers = ", ".join(str(reasons.index(why) + 1) for why in active.why)
    return f"{active.name} ({numbers})" if numbers else active.name


def markdown(table: Table) -> str:
    head, *rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, f"|{' --- |' * len(table[0])}", *rows])


def aligned(table: Table) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)


if __name__ == "__main__":
    sys.exit(main())
