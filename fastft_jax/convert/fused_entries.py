"""Merged checkpoints whose experts lie in one tensor a layer: the inverse of fused_experts.py, for writing."""

import re
from collections.abc import Mapping
from functools import partial

import numpy as np

from fastft_jax.convert.fused_experts import TURNS
from fastft_jax.convert.merged import Entry

_ONE = re.compile(r"(?P<experts>.*\.experts)\.\d+\.(?P<leaf>\w+)\.(?P<kind>weight|bias)")


def fused_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries of each expert's matrices and biases, in the order of the experts -> those of the published layout."""
    found: dict[str, Entry] = {}
    parts: dict[str, list[Entry]] = {}
    for name, entry in entries.items():
        match = _ONE.fullmatch(name)
        if match is None:
            found[name] = entry
            continue
        fused = f"{match['experts']}.{match['leaf']}{'_bias' if match['kind'] == 'bias' else ''}"
        experts = parts.setdefault(fused, [])
        experts.append(entry)
        shape = (len(experts), *entry.shape[::-1])
        found[fused] = Entry(entry.dtype, shape, partial(_read, experts, match["leaf"] == TURNS))
    return found


def _read(experts: list[Entry], in_turns: bool) -> np.ndarray:
    """One tensor of all experts, filled one by one."""
    out = np.empty((len(experts), *experts[0].shape[::-1]), experts[0].dtype)
    for row, expert in zip(out, experts, strict=True):
        value = np.asarray(expert.read())
        if in_turns:
            value = value.reshape(2, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
        row[...] = value.T
    return out
