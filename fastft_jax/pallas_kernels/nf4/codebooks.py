"""The two tables an NF4 array is decoded with, as numpy float32: the 16 NF4 values and the 256-entry dynamic map."""

import functools

import numpy as np

NF4_CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""Quantiles of a normal distribution scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E); ascending, exact zero."""


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """torch.linspace in float32: the first half counts up from `start`, the second down from `stop`."""
    start, stop = np.float32(start), np.float32(stop)
    step = float((stop - start) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, float(start) + step * i, float(stop) - step * (count - 1 - i)).astype(np.float32)


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 8-bit dynamic map, float32 [256] ascending, read-only: the values of bitsandbytes's create_dynamic_map.

    Seven decades, each with a linear fraction, the largest decade having the finest one (arXiv 1511.04561). The
    signed map runs from -0.993 to 1 with its zero at 127; the unsigned one from 0 to 1.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for decade in range(7):
        edges = _linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - 6)) * means
        values += [scaled, -scaled] if signed else [scaled]
    table = np.sort(np.concatenate(values))
    table.setflags(write=False)
    return table
