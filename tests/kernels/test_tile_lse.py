"""Log-sum-exps of tiles, exact and sampled, against the float64 reference."""

import math

import pytest
import torch

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.launch import EDGE
from kascade_kernels.tile_lse import keys_read
from tests.support.interpreter import tune
from tests.support.shapes import DEVICE, needs_kernels, shapes
from tests.support.tile_case import TileCase

pytestmark = needs_kernels

BUDGET = Budget(0.1, 64)
EXTENDS = [(270, 301), (0, 70), (128, 129), (90, 127), (31, 32), (0, 1)]
"""Whole tiles, first and last tiles in part, one query in mid-tile, and tiles that are dense."""


def check_lse(case: TileCase, lse: torch.Tensor, row: int, atol: float) -> None:
    """Log-sum-exps of a row, and +inf where there is no query."""
    exact = case.exact_lse(row)
    exact = torch.nn.functional.pad(exact, (0, lse.shape[2] - exact.shape[1]), value=math.inf)
    torch.testing.assert_close(lse[row].double(), exact, atol=atol, rtol=0)


@shapes
@pytest.mark.memcheck
def test_lse(group: int, dim: int, dtype: torch.dtype) -> None:
    case = TileCase.make(EXTENDS, group=group, dim=dim, dtype=dtype)
    out = torch.full((len(case.places), 2, TILE * group), float("nan"), device=DEVICE)
    lse = case.lse(BUDGET, out=out, max_end=301)
    assert lse is out
    for row in range(len(case.places)):
        if case.is_dense(row, BUDGET):
            assert lse[row].isnan().all()
        else:
            check_lse(case, lse, row, atol=2e-5)


def test_lse_merges_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that outweighs all others, in each span in turn."""
    tune(monkeypatch, "tile_lse", span=128)
    case = TileCase.make([(480, 500), (64, 300)])
    for position in (3, 200, 383, 481):
        case.k[case.req_to_token[case.places[0][0], position]] *= 9
    lse = case.lse(BUDGET)
    for row in range(len(case.places)):
        if not case.is_dense(row, BUDGET):
            check_lse(case, lse, row, atol=1e-4)


@pytest.mark.parametrize("stride, span", [(2, 2048), (8, 128), (1000, 128)])
def test_sampled_lse(stride: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(monkeypatch, "tile_lse", span=span)
    case = TileCase.make([(590, 617), (260, 290), (150, 256)])
    sampled, full = case.lse(BUDGET, stride=stride), case.lse(BUDGET)
    for row, (_, end, _, _) in enumerate(case.places):
        if case.is_dense(row, BUDGET):
            continue
        own = TILE * tile_of(end - 1)
        assert torch.equal(sampled[row], full[row]) == (own <= 2 * EDGE)
        weight = torch.zeros(end, dtype=torch.float64, device=DEVICE)
        middle = weight[EDGE : max(EDGE, own - EDGE)]
        picked = middle[::stride]
        picked += math.log2(max(len(middle), 1) / max(len(picked), 1))
        left_out = torch.arange(len(middle), device=DEVICE) % stride > 0
        middle.masked_fill_(left_out, float("-inf"))
        assert weight.isfinite().sum() == end - own + keys_read(own, stride)
        exact = case.exact_lse(row, weight)
        found = sampled[row, :, : exact.shape[1]].double()
        torch.testing.assert_close(found, exact, atol=2e-5, rtol=0)
