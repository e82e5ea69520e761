"""Queries that share a selection, many such spans at once.

``kascade_kernels.reference.tile_attention`` does the same for one tile. A prompt is run again
for every pair of layers, and one call a tile would leave a GPU waiting for Python.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch.nn import functional

from kascade_kernels.budget import TILE, Budget, tile_of

_LEAST_QUERIES = 16
"""That a span counts for, since its keys are gathered however few they are for."""


class Span(NamedTuple):
    """Positions [begin, end) of one tile whose queries share a selection."""

    begin: int
    end: int


def spans_of(length: int, rows: Sequence[int], budget: Budget) -> list[Span]:
    """How a prompt's positions select keys where it is served, ascending.

    rows: where the model answers, each a decoding step of its own; the others are prefilled, tile
    by tile. Those whose budget covers every key are left out.
    """
    alone, spans = set(rows), []
    for tile in range(tile_of(length - 1) + 1):
        if budget.is_dense(tile):
            continue
        positions = range(TILE * tile, min(length, TILE * (tile + 1)))
        for answers, run in groupby(positions, alone.__contains__):
            run = list(run)
            spans += [Span(row, row + 1) for row in run] if answers else [Span(run[0], run[-1] + 1)]
    return spans


def alike(spans: Sequence[Span], budget: Budget, most: int) -> Iterator[list[Span]]:
    """Cut spans into neighbours of one size, few enough to attend at once.

    most: queries times keys of one query head.
    """
    for _, run in groupby(spans, lambda span: span.end - span.begin):
        ready: list[Span] = []
        for span in run:
            keys = budget.selected(tile_of(span.begin)) + TILE  # the later, the more
            logits = max(span.end - span.begin, _LEAST_QUERIES) * keys
            if (len(ready) + 1) * logits > most and ready:
                yield ready
                ready = []
            ready.append(span)
        yield ready


class KeyLists(NamedTuple):
    """What B spans of n queries each attend to.

    queries: int64 [B, n], their positions. keys: int32 [B, H, C], positions of selected keys,
    padded. counts: int64 [B], how many of the C. Beside them each span sees, causally, its tile's.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    counts: torch.Tensor

    def of_heads(self, head_map: torch.Tensor, device: torch.device) -> "KeyLists":
        """Return the lists of the heads that a map names, [B, len(head_map), C], on a device."""
        keys = self.keys[:, head_map.to(self.keys.device)].to(device)
        return KeyLists(self.queries.to(device), keys, self.counts.to(device))


def key_lists(spans: Sequence[Span], selected: Sequence[torch.Tensor]) -> KeyLists:
    """Put together what spans of one size select: int64 [H, count] each."""
    device, most = selected[0].device, max(one.shape[1] for one in selected)
    keys = [functional.pad(one.int(), (0, most - one.shape[1])) for one in selected]
    queries = torch.tensor([range(*span) for span in spans], device=device)
    counts = torch.tensor([one.shape[1] for one in selected], device=device)
    return KeyLists(queries, torch.stack(keys), counts)


def attend_to_lists(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: KeyLists,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of spans to their selected keys and, causally, to their own tile.

    q: [L, Hq, D]. k, v: [L, H, D]. softcap: bound of the logits. Returns [B, n, Hq, D] in q's
    dtype, computed in float32, or float64 for float64.
    """
    (spans, n), (length, kv_heads, dim) = lists.queries.shape, k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    own = lists.queries[:, :1] // TILE * TILE + torch.arange(TILE, device=q.device)  # [B, 32]
    slots = own.clamp(max=length - 1)[:, None].expand(-1, kv_heads, -1)
    slots = torch.cat([lists.keys, slots], dim=2)  # [B, H, C + 32]
    heads = torch.arange(kv_heads, device=q.device)[:, None]
    rows = q[lists.queries].reshape(spans, n, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    keys, values = (states[slots, heads].to(dtype) for states in (k, v))  # [B, H, C + 32, D]
    logits = rows.flatten(2, 3).to(dtype) @ keys.transpose(2, 3) * scale  # [B, H, group n, C + 32]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    padding = torch.arange(lists.keys.shape[2], device=q.device) >= lists.counts[:, None]
    later = own[:, None] > lists.queries[:, :, None]  # [B, n, 32]
    hidden = torch.cat([padding[:, None].expand(-1, n, -1), later], dim=2)
    logits.unflatten(2, (-1, n)).masked_fill_(hidden[:, None, None], float("-inf"))
    out = (logits.softmax(-1) @ values).unflatten(2, (-1, n))  # [B, H, group, n, D]
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
