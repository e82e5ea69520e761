"""Partial attention merged by log-sum-exp, beside the reference in float64."""

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.merge_parts import Parts, merge_parts
from kascade_kernels.tuning import STEP
from tests.support.shapes import DEVICE, needs_kernels

pytestmark = needs_kernels

ROWS, HEADS, Q_HEADS, DIM = 3, 2, 4, 32


@pytest.mark.memcheck
@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_map", [None, [0, 1], [1, 0], [1, 1]], ids=str)
def test_merges_the_parts_that_were_written(
    splits: int, dtype: torch.dtype, head_map: list[int] | None
) -> None:
    """No other is read: those are NaN here."""
    heads = [0] * HEADS if head_map is None else head_map
    spans = torch.tensor([1, 3, 2], dtype=torch.int32, device=DEVICE)
    used = torch.tensor([[1, splits], [2, 1], [splits - 1, 1]], device=DEVICE)
    lengths = (used * spans[:, None] * STEP - torch.tensor([0, 17], device=DEVICE)).to(torch.int32)
    if head_map is None:
        used, lengths = used[:, :1], lengths[:, :1].contiguous()
    parts = Parts.empty(ROWS * Q_HEADS * splits, DIM, DEVICE)
    lse = parts.lse.fill_(float("nan")).view(ROWS, Q_HEADS, splits)
    out = parts.out.fill_(float("nan")).view(ROWS, Q_HEADS, splits, DIM)
    expected = torch.empty(ROWS, Q_HEADS, DIM, dtype=torch.float64, device=DEVICE)
    for row in range(ROWS):
        for q_head in range(Q_HEADS):
            count = int(used[row, heads[q_head // (Q_HEADS // HEADS)]])
            lse[row, q_head, :count] = 5 * torch.randn(count)
            out[row, q_head, :count] = torch.randn(count, DIM)
            some = out[row, q_head, :count].double(), lse[row, q_head, :count].double()
            expected[row, q_head] = reference.merge_parts(*some)
    mapped = None if head_map is None else torch.tensor(heads, dtype=torch.int32, device=DEVICE)
    merged = torch.empty(ROWS, Q_HEADS, DIM, dtype=dtype, device=DEVICE)
    assert merge_parts(parts, splits, lengths, spans, merged, mapped) is merged
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(merged.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_part_without_keys_has_no_weight() -> None:
    out, lse = torch.randn(3, DIM).double(), torch.tensor([1.0, float("-inf"), 3.0]).double()
    weights = torch.tensor([0.2, 0.0, 0.8]).double()
    torch.testing.assert_close(reference.merge_parts(out, lse), weights @ out)
