"""Records into sequences of a fixed capacity, few tokens left over."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, open_bins: int = 64) -> list[list[int]]:
    """First-fit: each record goes, in the given order, into the oldest open sequence that has room for it.

    At most `open_bins` sequences are open; where a record needs a new one, the fullest is closed (of equally full ones
    the oldest). O(n * open_bins), and a function of its arguments alone.

    Args:
        lengths: tokens of each record, 1 … capacity.
        capacity: tokens of a sequence.

    Returns:
        The records of each sequence, ascending; sequences in the order in which they were begun.

    Raises:
        ValueError: a length that is not in 1 … capacity, or no open sequence allowed.
    """
    if open_bins < 1:
        raise ValueError(f"open_bins={open_bins}: at least one sequence must be open")
    for record, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"record {record} has {length} tokens, a sequence holds 1 to {capacity}; leave it out, shorten it, or "
                "raise the sequence length"
            )
    least = min(lengths, default=1)
    bins: list[list[int]] = []
    open_ids: list[int] = []  # of those in `bins`, oldest first, and the room left in each
    room: list[int] = []
    for record, length in enumerate(lengths):
        at = next((k for k, left in enumerate(room) if left >= length), None)
        if at is None:
            if len(room) == open_bins:
                fullest = room.index(min(room))
                del room[fullest], open_ids[fullest]
            at = len(room)
            room.append(capacity)
            open_ids.append(len(bins))
            bins.append([])
        bins[open_ids[at]].append(record)
        room[at] -= length
        if room[at] < least:  # nothing fits any more
            del room[at], open_ids[at]
    return bins
