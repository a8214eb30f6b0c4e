"""From prepared documents to batches: fixed shapes, and an order that depends on (seed, epoch) alone."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft_jax.errors import DataError
from fastft_jax.trainers.data.packing import pack
from fastft_jax.trainers.data.prepared import IGNORED

if TYPE_CHECKING:
    from fastft_jax.trainers.data.prepared import PreparedDataset

_WIDTH_STEP = 64  # row widths are multiples of this, which matmul tiles like


class BatchSource:
    """Batches of a PreparedDataset, each computed from (seed, epoch, index) alone, so resuming is asking again.

    batch_size: rows B of a batch; max_length: the most tokens T of a row. T is the same for every batch: the longest
    row, rounded up to a multiple of 64, at most max_length. packing: documents share rows (packed once, so shapes and
    `max_segments` are the same in every epoch); otherwise a document a row. shuffle: the rows' order, anew each epoch.
    drop_last: leave out the last batch when it is not full; otherwise rows of padding fill it, so its shape is the
    same. pad_id: the data set's own when None.
    Raises DataError when no batch is to be had.
    """

    def __init__(
        self,
        prepared: "PreparedDataset",
        batch_size: int,
        max_length: int,
        *,
        packing: bool = False,
        seed: int = 3407,
        shuffle: bool = True,
        pad_id: int | None = None,
        drop_last: bool = False,
    ):
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1")
        self._prepared = prepared
        self._seed = seed
        self._shuffle = shuffle
        self._drawn: tuple[int, np.ndarray] | None = None
        self.pad_id = prepared.pad_id if pad_id is None else pad_id
        self.batch_size = batch_size
        self.packing = packing
        lengths = [len(ids) for ids in prepared.input_ids]
        if not lengths:
            raise DataError("no documents to make batches of")
        if max(lengths) > max_length:
            raise DataError(
                f"a document has {max(lengths)} tokens, max_length is {max_length}: prepare with the same one"
            )
        self.rows = pack(lengths, max_length) if packing else [[i] for i in range(len(lengths))]
        widest = max(sum(lengths[i] for i in row) for row in self.rows)
        self.width = min(max_length, -(-widest // _WIDTH_STEP) * _WIDTH_STEP)
        self.max_segments = max(len(row) for row in self.rows)
        self.longest = max(lengths)
        self.n_rows = len(self.rows)
        self.n_tokens = sum(lengths)
        self.steps_per_epoch = self.n_rows // batch_size if drop_last else -(-self.n_rows // batch_size)
        if self.steps_per_epoch == 0:
            raise DataError(f"{self.n_rows} rows do not fill one batch of {batch_size}, and drop_last is on")

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.n_tokens / (self.n_rows * self.width)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of this epoch. Raw Philox output: the same in every version of numpy."""
        if not self._shuffle:
            return np.arange(self.n_rows)
        if self._drawn is not None and self._drawn[0] == epoch:
            return self._drawn[1]  # asked for at every step: sorting a large data set each time would be felt
        key = np.array([self._seed % 2**64, epoch % 2**64], dtype=np.uint64)
        drawn = np.argsort(np.random.Philox(key=key).random_raw(self.n_rows), kind="stable")
        self._drawn = epoch, drawn
        return drawn

    def batch(self, epoch: int, index: int) -> dict[str, Any]:
        """Batch `index` of `epoch`: int32 [B, T] arrays, and the source rows in it.

        input_ids: tokens, pad_id after them. labels: the token that position t is to predict, or -100 (not trained;
        the last token of a document; padding). positions: 0, 1, ... from each document's start. segment_ids: 1, 2, ...
        for the documents of a row, 0 for padding. rows: numbers of the source rows, a list (for error messages).
        """
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"batch {index} of an epoch with {self.steps_per_epoch}")
        return self._assemble(self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch from `start` on (the same as calling `batch`, with the order computed once)."""
        order = self.order(epoch)
        for index in range(start, self.steps_per_epoch):
            yield self._assemble(order[index * self.batch_size : (index + 1) * self.batch_size])

    def _assemble(self, rows: np.ndarray) -> dict[str, Any]:
        shape = (self.batch_size, self.width)
        input_ids = np.full(shape, self.pad_id, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        positions = np.zeros(shape, np.int32)
        segment_ids = np.zeros(shape, np.int32)
        source_rows: list[int] = []
        for b, row in enumerate(rows):
            start = 0
            for segment, document in enumerate(self.rows[row], start=1):
                ids = self._prepared.input_ids[document]
                stop = start + len(ids)
                input_ids[b, start:stop] = ids
                labels[b, start : stop - 1] = self._prepared.labels[document][1:]  # t predicts t + 1
                positions[b, start:stop] = np.arange(len(ids))
                segment_ids[b, start:stop] = segment
                source_rows.append(self._prepared.row_numbers[document])
                start = stop
        return {
            "input_ids": input_ids,
            "labels": labels,
            "positions": positions,
            "segment_ids": segment_ids,
            "rows": source_rows,
        }
