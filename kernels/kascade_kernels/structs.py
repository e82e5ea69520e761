"""What a step's kernels share."""

from __future__ import annotations

from typing import NamedTuple

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types in which a pool may hold keys and values beside the queries' own."""


SINKS = (torch.float32, torch.bfloat16, torch.float16)
"""Types in which a model may have its sinks."""


class Rows(NamedTuple):
    """Query tiles of a step, one row each; decoding is the case of one query a row.

    requests: int32 or int64 [rows], row of the slot table.
    ends: int32 or int64 [rows], keys that the row's last query sees: its position + 1.
    starts: int32 [rows], the row's first query in q; None where row i has the one query i.
    tokens: int32 [rows], the row's queries, 1 to 32; None with ``starts``.
    """

    requests: torch.Tensor
    ends: torch.Tensor
    starts: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


class KeyCopy(NamedTuple):
    """A layer's keys in 8 bits, for scoring only.

    values: int8 [slots, H, D]; a key is values * scales.
    scales: float32 [slots, H], the head's largest magnitude / 127.
    """

    values: torch.Tensor
    scales: torch.Tensor


class Lists(NamedTuple):
    """An anchor's selected keys, as KV slots, ascending by position.

    Each row has one list for each KV head, or one for all. How long lists are is decided before
    they are filled: by the host in prefill, by ``decode_lists`` in decoding. A list that holds
    all that its row sees needs no scores.
    slots: int32 [total]; list l of row r starts at offsets[r, l].
    offsets: int64 [rows, lists].
    counts: int32 [rows, lists], keys on each list; in decoding the query's own tile included.
    """

    slots: torch.Tensor
    offsets: torch.Tensor
    counts: torch.Tensor

    @property
    def per_row(self) -> int:
        """Lists of each row: the KV heads, or 1 where one list serves all."""
        return self.counts.shape[1]

    def rows(self, first: int, last: int) -> Lists:
        """Return the lists of some of the rows."""
        return Lists(self.slots, self.offsets[first:last], self.counts[first:last])


class Pool(NamedTuple):
    """Candidate pools of a decode step's rows: what anchors after a maker score.

    A pool is a list like any other, own tile included, and of whole tiles before it. So to score
    and to select, a pool is a shorter context: ``ends`` are its rows' ends, its lists their slots.
    lists: pools, one for each KV head of the maker, or one for all; those of a row are as long.
    ends: int32 [rows], keys of each pool. spans: int32 [rows], as ``Spans.score``.
    """

    lists: Lists
    ends: torch.Tensor
    spans: torch.Tensor

    def rows(self, first: int, last: int) -> Pool:
        """Return the pools of some of the rows."""
        return Pool(self.lists.rows(first, last), self.ends[first:last], self.spans[first:last])


class PoolKeys(NamedTuple):
    """Keys to score by pools' lists, in place of a slot table.

    head_map: int32 [H], which of a row's pools each KV head scores.
    """

    lists: Lists
    head_map: torch.Tensor
