"""Importance matrices: how large a model's activations are, column by column, on text that llama-imatrix was run on.

The file is GGUF: for each weight `NAME.in_sum2` [1, K], sums of squared activations, and `NAME.counts` [1, 1], of how
many; of experts' weights [E, K] and [E, 1]. k-quants spend their precision where the mean square is large.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.errors import CheckpointError

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path | str) -> dict[str, Float[np.ndarray, "*E K"]]:
    """GGUF's name of a weight -> the mean square of what it multiplies, 1 where nothing was counted; expert by expert
    where there are several.

    CheckpointError for a file that is none, older than GGUF, or not finite.
    """
    file = GGUFFile(Path(path).expanduser())
    means = {}
    for name in file.tensors:
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        if weight + _COUNTS not in file.tensors:
            raise CheckpointError(f"{path}: {weight} has no counts: it is not a whole importance matrix")
        counts = file.decode(weight + _COUNTS).reshape(-1, 1)
        sums = file.decode(name).reshape(counts.size, -1)
        mean = np.where(counts > 0, sums / np.where(counts > 0, counts, 1), 1).astype(np.float32)
        means[weight] = mean if counts.size > 1 else mean[0]
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
        wanted = (*shapes[name][:-2], shapes[name][-1])
        if means[name].shape != wanted:
            found, ours = (" experts of ".join(map(str, shape)) for shape in (means[name].shape, wanted))
            raise CheckpointError(f"{path}: {name} has {found} columns, this model's has {ours}")
