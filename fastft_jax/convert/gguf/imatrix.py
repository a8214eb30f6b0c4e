"""Importance matrices: how large a model's activations are, column by column, on text that llama-imatrix was run on.

The file is GGUF: for each weight `NAME.in_sum2` [1, K], sums of squared activations, and `NAME.counts` [1, 1], of how
many. k-quants spend their precision where the mean square is large.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.errors import CheckpointError

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path | str) -> dict[str, Float[np.ndarray, "K"]]:
    """GGUF's name of a weight -> the mean square of what it multiplies, 1 where nothing was counted.

    CheckpointError for a file that is none, older than GGUF, of a mixture of experts, or not finite.
    """
    file = GGUFFile(Path(path).expanduser())
    means = {}
    for name in file.tensors:
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        if weight + _COUNTS not in file.tensors:
            raise CheckpointError(f"{path}: {weight} has no counts: it is not a whole importance matrix")
        sums, counts = file.decode(name), file.decode(weight + _COUNTS).reshape(-1)
        if counts.size != 1:
            raise CheckpointError(f"{path}: {weight} is of {counts.size} experts, which cannot be read")
        means[weight] = (sums / counts[0] if counts[0] > 0 else np.ones_like(sums)).reshape(-1)
        if not np.isfinite(means[weight]).all():
            raise CheckpointError(f"{path}: {weight} has values that are not finite")
    if not means:
        raise CheckpointError(f"{path} is not an importance matrix: it holds no *{_SUMS}")
    return means


def check_imatrix(path: Path | str, means: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """CheckpointError where the matrix is another model's."""
    known = [name for name in means if name in shapes]
    if not known:
        raise CheckpointError(f"{path} holds {next(iter(means))!r} and the like, which this model does not have")
    for name in known:
        if means[name].size != shapes[name][-1]:
            raise CheckpointError(f"{path}: {name} has {means[name].size} columns, this model's has {shapes[name][-1]}")
