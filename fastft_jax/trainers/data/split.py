"""`datasets`' split expressions, for rows that are not in a `datasets` builder: "train", "train[:100]", "a[10%:]+b"."""

import re
from typing import TYPE_CHECKING, NamedTuple

from fastft_jax.errors import DataError

if TYPE_CHECKING:
    from fastft_jax.trainers.data.rows import Rows

_PART = re.compile(r"(?P<name>[^\[\]+]+?)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class SplitPart(NamedTuple):
    """One term of a split expression: a name and two bounds, each a row number or a percentage such as "10%"."""

    name: str
    start: str | None
    stop: str | None

    def bounds(self, n: int) -> tuple[int, int]:
        """Row numbers [start, stop) of a split with n rows; percentages are rounded to the nearest row."""
        start, stop, _ = slice(_row(self.start, n), _row(self.stop, n)).indices(n)
        return start, max(start, stop)


def _row(bound: str | None, n: int) -> int | None:
    if bound is None:
        return None
    return round(int(bound[:-1]) * n / 100) if bound.endswith("%") else int(bound)


def parse_split(split: str) -> list[SplitPart]:
    """Raises DataError for an expression that is not one."""
    parts = []
    for term in split.split("+"):
        match = _PART.fullmatch(term.strip())
        if match is None:
            raise DataError(f'split {split!r} is not understood; write e.g. "train", "train[:100]" or "train[10%:20%]"')
        parts.append(SplitPart(match["name"].strip(), match["start"], match["stop"]))
    return parts


def select(splits: "dict[str, Rows]", expression: str) -> "Rows":
    """The rows that `expression` asks for, out of splits by name."""
    chosen = []
    for part in parse_split(expression):
        if part.name not in splits:
            raise DataError(f"no split {part.name!r}; there is {', '.join(map(repr, splits))}")
        rows = splits[part.name]
        start, stop = part.bounds(len(rows))
        whole = (start, stop) == (0, len(rows))
        chosen.append(
            rows if whole else rows[start:stop] if isinstance(rows, list) else rows.select(range(start, stop))
        )
    if len(chosen) == 1:
        return chosen[0]
    if all(isinstance(rows, list) for rows in chosen):
        return [row for rows in chosen for row in rows]
    import datasets

    return datasets.concatenate_datasets(chosen)
