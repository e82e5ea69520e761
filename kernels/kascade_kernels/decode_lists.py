"""How long a decode step's lists are, and how it is cut into programs.

Grids come from the batch size and must not depend on lengths, so that a captured graph fits every
replay. So a row has room for ``most`` programs, and how many keys each takes is computed on the
device, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from kascade_kernels import tuning
from kascade_kernels._triton._decode_lists import decode_lists_kernel
from kascade_kernels.budget import Budget, PoolRule
from kascade_kernels.checks import (
    require_contiguous,
    require_dtype,
    require_lists,
    require_shape,
)
from kascade_kernels.structs import Pool


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
        splits = most_splits(rows, heads, steps.device, batch_invariant=batch_invariant)
        return Spans(steps[0, :rows], steps[1, :rows], *splits)

    def rows(self, first: int, last: int) -> Spans:
        """Return the spans of some of the rows."""
        return self._replace(score=self.score[first:last], attend=self.attend[first:last])


class Budgets(NamedTuple):
    """Each row's budget, on the device: int32 [rows] each."""

    ratios_ppm: torch.Tensor
    min_ks: torch.Tensor

    @staticmethod
    def of(budgets: Sequence[Budget], device: torch.device | str) -> Budgets:
        """Put one budget a row on a device."""
        columns = [[each.ratio_ppm for each in budgets], [each.min_k for each in budgets]]
        return Budgets(*torch.tensor(columns, dtype=torch.int32, device=device))

    def rows(self, count: int) -> Budgets:
        """Return the budgets of the first rows."""
        return Budgets(self.ratios_ppm[:count], self.min_ks[:count])


def most_splits(
    rows: int, heads: int, device: torch.device, *, batch_invariant: bool
) -> tuple[int, int]:
    """Return the most programs of one row and head: of scoring, and of attention."""
    if batch_invariant:
        return tuning.INVARIANT_SPLITS, tuning.INVARIANT_SPLITS
    score, attend = (_splits(tuning.cut(kind, device), rows * heads) for kind in tuning.CUTS)
    return score, attend


def _splits(cut: tuning.Cut, lists: int) -> int:
    return max(2, min(cut.most, triton.next_power_of_2(triton.cdiv(cut.grid, lists))))


def decode_lists(
    ends: torch.Tensor,
    heads: int,
    budgets: Budgets,
    spans: Spans,
    counts: torch.Tensor,
    *,
    batch_invariant: bool = False,
    pool: Pool | None = None,
    rule: PoolRule | None = None,
) -> None:
    """Fill ``spans`` and ``counts`` for one step: the only kernel that knows budgets.

    ends: [rows], keys that each row's query sees. heads: KV heads.
    counts: int32 [rows, lists], becomes the keys on each list, own tile included.
    pool, rule: where rows have candidate pools, what of them is filled (all but offsets and slots),
        and how long they are.
    """
    rows = ends.shape[0]
    require_shape("counts", counts, (rows, None))
    require_dtype("counts", counts, torch.int32)
    require_contiguous("counts", counts)
    for name, values in zip(Budgets._fields, budgets, strict=True):
        require_shape(f"budgets.{name}", values, (rows,))
        require_dtype(f"budgets.{name}", values, torch.int32)
        require_contiguous(f"budgets.{name}", values)
    if (pool is None) != (rule is None):
        raise ValueError("pool: expected a rule with it, and none without")
    if pool is not None:
        require_lists(pool.lists, rows, (counts.shape[1],))
        for name in ("ends", "spans"):
            require_shape(f"pool.{name}", getattr(pool, name), (rows,))
            require_dtype(f"pool.{name}", getattr(pool, name), torch.int32)
    device = counts.device
    decode_lists_kernel[(1,)](
        ends=ends,
        score_spans=spans.score,
        attend_spans=spans.attend,
        counts=counts,
        ratios_ppm=budgets.ratios_ppm,
        min_ks=budgets.min_ks,
        pool_counts=None if pool is None else pool.lists.counts,
        pool_ends=None if pool is None else pool.ends,
        pool_spans=None if pool is None else pool.spans,
        rows=rows,
        ROWS=triton.next_power_of_2(rows),
        LISTS=counts.shape[1],
        SCORE_PROGRAMS=max(1, tuning.cut("score", device).programs // heads),
        SCORE_MOST=spans.score_splits,
        ATTEND_PROGRAMS=max(1, tuning.cut("attend", device).programs // heads),
        ATTEND_MOST=spans.attend_splits,
        STEP=tuning.STEP,
        SHARE_PPM=0 if rule is None else rule.share_ppm,
        BATCH_INVARIANT=batch_invariant,
        **tuning.launch("decode_lists", device).options(),
    )
