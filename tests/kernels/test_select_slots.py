"""Exact Top-k of score codes against a stable sort."""

import pytest
import torch

from decode_case import DecodeCase, lists_of
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import Budget, tile_of
from kascade_kernels.reference import select_topk
from kascade_kernels.select_slots import CodeBuffer, count_high, select_slots
from kascade_kernels.structs import Selection
from shapes import DEVICE, needs_kernels

pytestmark = needs_kernels

LENGTHS = [1, 31, 32, 33, 65, 97, 127, 128, 129, 300, 1280, 1281]


def draw_codes(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    if kind == "constant":
        codes = torch.full(shape, 777)
    elif kind == "few":
        codes = torch.randint(0, 3, shape) * 300
    elif kind == "extremes":
        codes = torch.randint(0, 2, shape) * 65535
    elif kind == "near":
        codes = 40960 + torch.randint(0, 40, shape)
    else:
        codes = torch.randint(0, 65536, shape)
    return codes


def select(case: DecodeCase, codes: torch.Tensor, budget: Budget, append_own: bool) -> Selection:
    rows, lists, keys = codes.shape
    buffer = CodeBuffer.allocate(rows, lists, keys, empty_on(DEVICE))
    buffer.codes.copy_(codes.to(torch.uint16))
    count_high(buffer, case.rows, budget)
    selection = case.empty_selection(lists, budget)
    select_slots(buffer, case.req_to_token, case.rows, budget, selection, append_own=append_own)
    return selection


@pytest.mark.parametrize("kind", ["constant", "few", "extremes", "near", "any"])
@pytest.mark.parametrize("append_own, min_k", [(False, 64), (True, 128)], ids=["before", "own"])
def test_equals_a_stable_sort(kind: str, append_own: bool, min_k: int) -> None:
    case, budget = DecodeCase.make(LENGTHS), Budget(0.1, min_k)
    codes = draw_codes(kind, (len(LENGTHS), 2, max(LENGTHS)))
    selection = select(case, codes, budget, append_own)
    for row, length in enumerate(LENGTHS):
        tile = tile_of(length - 1)
        expected = select_topk(codes[row, :, : 32 * tile], budget.selected(tile))
        if append_own:
            own = torch.arange(32 * tile, length).expand(2, -1)
            expected = torch.cat([expected, own], dim=1)
        assert torch.equal(lists_of(selection, row), case.slots_of(row)[expected.to(DEVICE)])


@pytest.mark.memcheck
def test_lists_of_several_chunks() -> None:
    lengths = [8192, 8225, 20000]
    case, budget = DecodeCase.make(lengths), Budget(0.1, 64)
    codes = draw_codes("near", (3, 2, max(lengths)))
    selection = select(case, codes, budget, append_own=False)
    for row, length in enumerate(lengths):
        tile = tile_of(length - 1)
        expected = select_topk(codes[row, :, : 32 * tile], budget.selected(tile))
        assert torch.equal(lists_of(selection, row), case.slots_of(row)[expected.to(DEVICE)])


@pytest.mark.memcheck
@pytest.mark.parametrize("ratio", [0.013, 0.5, 0.999, 1.0])
def test_other_budgets(ratio: float) -> None:
    case, budget = DecodeCase.make([700]), Budget(ratio, 96)
    codes = draw_codes("few", (1, 2, 700))
    selection = select(case, codes, budget, append_own=False)
    tile = tile_of(699)
    expected = select_topk(codes[0, :, : 32 * tile], budget.selected(tile))
    assert torch.equal(lists_of(selection, 0), case.slots_of(0)[expected.to(DEVICE)])
