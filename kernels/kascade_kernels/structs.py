"""What a step's kernels share."""

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """Query tiles of a step, one row each; decoding is the case of one query a row.

    requests: int32 or int64 [rows], row of the slot table.
    ends: int32 or int64 [rows], keys that the row's last query sees: its position + 1.
    starts: int32 [rows], the row's first query in q; None where row i has the one query i.
    counts: int32 [rows], the row's queries, 1 to 32; None with ``starts``.
    """

    requests: torch.Tensor
    ends: torch.Tensor
    starts: torch.Tensor | None = None
    counts: torch.Tensor | None = None


class KeyCopy(NamedTuple):
    """A layer's keys in 8 bits, for scoring only.

    values: int8 [slots, H, D]; a key is values * scales.
    scales: float32 [slots, H], the head's largest magnitude / 127.
    """

    values: torch.Tensor
    scales: torch.Tensor


class Selection(NamedTuple):
    """An anchor's selection, as KV slots, ascending by position.

    slots: int32 [total]; row r's list of KV head h starts at offsets[r] + h * counts[r].
    offsets: int64 [rows].
    counts: int32 [rows], keys in each of the row's lists.
    heads: lists per row: the KV heads, or 1 where one selection serves all.
    """

    slots: torch.Tensor
    offsets: torch.Tensor
    counts: torch.Tensor
    heads: int
