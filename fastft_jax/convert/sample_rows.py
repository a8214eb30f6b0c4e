"""The rows on which an export is compared with the live model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from fastft_jax.errors import ConfigError

ROWS, ROW_LENGTH = 4, 64  # of random tokens, for a model without a tokenizer
# What every language model has seen enough of for its perplexity to mean something: plain prose, a list, numbers, code
TEXT = (
    "The old lighthouse stood at the end of the pier, and every evening the keeper climbed its narrow stairs to light "
    "the lamp. He had done so for thirty years, in summer and in winter, and he knew each ship by the sound of its "
    "bell. When the fog came in, he rang his own.",
    "To make bread you need flour, water, salt and yeast. Mix them in a large bowl, knead the dough for ten minutes, "
    "and let it rest until it has doubled in size. Then bake it in a hot oven for about forty minutes.",
    "In 2019 the city had 84,000 inhabitants; ten years earlier there were 61,500. Most of them work in the harbour, "
    "in two hospitals, or at the university, which teaches law, medicine and engineering.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\n\nprint(mean([1, 2, 3]))\n",
)


def comparison_rows(
    rows: Sequence[Sequence[int]] | None, tokenizer: Any, vocab: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """(ids, mask), padded on the right: of the rows given; or of TEXT; or, without a tokenizer, random tokens.

    Raises ConfigError for rows that are empty or hold ids outside of the vocabulary.
    """
    if rows is None:
        made = _text_rows(tokenizer, vocab)
        if made is None:
            ids = np.random.default_rng(0).integers(0, vocab, (ROWS, ROW_LENGTH))
            return ids, np.ones_like(ids)
        rows = made
    rows = [np.asarray(row, np.int64).reshape(-1) for row in rows]
    rows = [row for row in rows if row.size]
    if not rows:
        raise ConfigError("rows is empty: give token ids to compare on, or None for a few sentences")
    if any(row.min() < 0 or row.max() >= vocab for row in rows):
        raise ConfigError(f"rows hold token ids outside the model's vocabulary of {vocab}")
    ids = np.zeros((len(rows), max(row.size for row in rows)), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : row.size], mask[i, : row.size] = row, 1
    return ids, mask


def _text_rows(tokenizer: Any, vocab: int) -> list[list[int]] | None:
    """TEXT in the tokenizer's ids; None where there is no tokenizer, or it is another model's."""
    if tokenizer is None:
        return None
    # its own truncation would be written into tokenizer.json with the model
    rows = [tokenizer(text, verbose=False)["input_ids"][:ROW_LENGTH] for text in TEXT]
    return rows if all(row and max(row) < vocab for row in rows) else None
