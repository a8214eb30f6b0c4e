"""Packing: several short documents share one row of `capacity` tokens, so that little of a batch is padding."""

from collections.abc import Sequence

from fastft_jax.errors import DataError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: longest document first, each into the first row with room for it.

    lengths: of the documents; capacity: of a row. Returns rows of document numbers: rows in the order they were
    opened, the documents of a row in source order. Every document is in exactly one row. The number of rows is at
    most 11/9 of the least possible, plus 6/9 (Dosa 2007). O(n log n): rows are the leaves of a tree that knows the
    most room below each node. Raises DataError for a document longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > capacity:
        raise DataError(f"document {order[0]} has {lengths[order[0]]} tokens, a packed row {capacity}")
    n_leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * n_leaves)  # room[1] is the root, room[n_leaves + j] is row j
    rows: list[list[int]] = []
    for document in order:
        length = lengths[document]
        node = 1
        while node < n_leaves:
            node *= 2
            if room[node] < length:
                node += 1
        row = node - n_leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(row) for row in rows]
