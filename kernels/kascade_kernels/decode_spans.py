"""How a decode step is cut into programs: grids from the batch size, spans from the lengths.

Grids must not depend on lengths, so that a captured graph fits every replay. So a row has room
for ``most`` programs, and how many keys each takes is computed on the device, once a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from kascade_kernels._triton._decode_spans import decode_spans_kernel
from kascade_kernels.budget import Budget

STEP = 64
"""Keys of one block, in which spans are counted: the compiler then knows their alignment."""
SCORE_PROGRAMS = 8192
ATTEND_PROGRAMS = 512
"""Programs of all rows and heads together; attention runs best as one wave of four an SM."""
SCORE_SPLITS, ATTEND_SPLITS = 64, 32
"""Most programs of one row and head."""
INVARIANT_SPLITS = 16
"""Programs of each row and head where a row must not depend on its batch."""


class Spans(NamedTuple):
    """Steps of keys that one program takes.

    score, attend: int32 [rows].
    score_splits, attend_splits: most programs for one row and head, powers of two.
    """

    score: torch.Tensor
    attend: torch.Tensor
    score_splits: int
    attend_splits: int

    @staticmethod
    def allocate(
        rows: int, heads: int, device: torch.device | str, *, batch_invariant: bool = False
    ) -> Spans:
        """Allocate for ``rows`` requests with ``heads`` KV heads.

        batch_invariant: cut each row by its own length alone, so that its sums have the same
            order in any batch.
        """
        steps = torch.empty(2, rows, dtype=torch.int32, device=device)
        return Spans.within(steps, rows, heads, batch_invariant=batch_invariant)

    @staticmethod
    def within(
        steps: torch.Tensor, rows: int, heads: int, *, batch_invariant: bool = False
    ) -> Spans:
        """Lay the spans of a step out in ``steps``, int32 [2, at least ``rows``]."""
        splits = most_splits(rows, heads, batch_invariant=batch_invariant)
        return Spans(steps[0, :rows], steps[1, :rows], *splits)

    def rows(self, first: int, last: int) -> Spans:
        """Return the spans of some of the rows."""
        return self._replace(score=self.score[first:last], attend=self.attend[first:last])


def most_splits(rows: int, heads: int, *, batch_invariant: bool) -> tuple[int, int]:
    """Return the most programs of one row and head: of scoring, and of attention."""
    if batch_invariant:
        return INVARIANT_SPLITS, INVARIANT_SPLITS
    lists = rows * heads
    return _splits(8192, lists, SCORE_SPLITS), _splits(4096, lists, ATTEND_SPLITS)


def _splits(programs: int, lists: int, most: int) -> int:
    return max(2, min(most, triton.next_power_of_2(triton.cdiv(programs, lists))))


def decode_spans(
    ends: torch.Tensor, heads: int, budget: Budget, spans: Spans, *, batch_invariant: bool = False
) -> None:
    """Fill ``spans`` for one step; ends: [rows], keys that each row's query sees."""
    rows = ends.shape[0]
    decode_spans_kernel[(1,)](
        ends,
        spans.score,
        spans.attend,
        rows,
        budget.ratio_ppm,
        budget.min_k,
        ROWS=triton.next_power_of_2(rows),
        SCORE_PROGRAMS=max(1, SCORE_PROGRAMS // heads),
        SCORE_MOST=spans.score_splits,
        ATTEND_PROGRAMS=max(1, ATTEND_PROGRAMS // heads),
        ATTEND_MOST=spans.attend_splits,
        STEP=STEP,
        BATCH_INVARIANT=batch_invariant,
        num_warps=4,
    )
