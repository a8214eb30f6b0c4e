"""Setting rows aside for evaluation."""

from typing import Any

import numpy as np

from fastft_jax.errors import DataError


def hold_out(rows: Any, fraction: float, *, seed: int) -> tuple[Any, Any]:
    """(training rows, evaluation rows): a `fraction` of the rows, drawn by `seed` alone; both keep the file's order.

    rows: a datasets.Dataset or a list. Raises DataError when either part would be empty.
    """
    count = round(len(rows) * fraction)
    if not 0 < count < len(rows):
        raise DataError(f"eval_fraction={fraction} of {len(rows)} rows leaves no row to train or to evaluate on")
    drawn = np.argsort(np.random.Philox(key=seed).random_raw(len(rows)), kind="stable")[:count]
    held = np.zeros(len(rows), bool)
    held[drawn] = True
    picked = [np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()]
    if hasattr(rows, "select"):
        train, evaluation = (rows.select(part) for part in picked)
    else:
        train, evaluation = ([rows[i] for i in part] for part in picked)
    return train, evaluation
