"""Exact Top-k of score codes against a stable sort."""

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.select_slots import CodeBuffer, count_high, select_slots
from kascade_kernels.structs import Lists
from tests.support.decode_case import DecodeCase, list_of
from tests.support.shapes import DEVICE, needs_kernels

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


def select(
    case: DecodeCase, codes: torch.Tensor, counts: list[list[int]], append_own: bool = False
) -> Lists:
    rows, per_row, keys = codes.shape
    buffer = CodeBuffer.allocate(rows, per_row, keys, empty_on(DEVICE))
    buffer.codes.copy_(codes.to(torch.uint16))
    count_high(buffer, case.rows, case.lists(counts, append_own=False))
    lists = case.lists(counts, append_own=append_own)
    select_slots(buffer, case.req_to_token, case.rows, lists, append_own=append_own)
    return lists


def check(case: DecodeCase, codes: torch.Tensor, lists: Lists, counts: list[list[int]]) -> None:
    """Every list is a stable sort's first ``count``, then what it has of the own tile."""
    for row, length in enumerate(case.lengths):
        candidates = TILE * tile_of(length - 1)
        for index, count in enumerate(counts[row]):
            found, slots = list_of(lists, row, index), case.slots_of(row)
            scores = codes[row, index : index + 1, :candidates].to(DEVICE)
            best = reference.select_slots(scores, slots, count)[0]
            own = slots[candidates : candidates + len(found) - count]
            assert torch.equal(found, torch.cat([best, own]))


@pytest.mark.parametrize("kind", ["constant", "few", "extremes", "near", "any"])
@pytest.mark.parametrize("append_own, min_k", [(False, 64), (True, 128)], ids=["before", "own"])
def test_equals_a_stable_sort(kind: str, append_own: bool, min_k: int) -> None:
    case = DecodeCase.make(LENGTHS)
    counts = case.counts(2, Budget(0.1, min_k))
    codes = draw_codes(kind, (len(LENGTHS), 2, max(LENGTHS)))
    lists = select(case, codes, counts, append_own)
    assert all(len(list_of(lists, row, 0)) > counts[row][0] for row in range(3)) == append_own
    check(case, codes, lists, counts)


@pytest.mark.memcheck
def test_list_of_several_chunks() -> None:
    lengths = [8192, 8225, 20000]
    case = DecodeCase.make(lengths)
    counts = case.counts(2, Budget(0.1, 64))
    codes = draw_codes("near", (3, 2, max(lengths)))
    check(case, codes, select(case, codes, counts), counts)


@pytest.mark.memcheck
@pytest.mark.parametrize("ratio", [0.013, 0.5, 0.999, 1.0])
def test_other_budgets(ratio: float) -> None:
    case = DecodeCase.make([700])
    counts = case.counts(2, Budget(ratio, 96))
    codes = draw_codes("few", (1, 2, 700))
    check(case, codes, select(case, codes, counts), counts)


@pytest.mark.memcheck
@pytest.mark.parametrize("append_own", [False, True], ids=["before", "own"])
def test_list_of_one_row_differ_in_length(append_own: bool) -> None:
    """Down to none of the candidates, and up to all of them."""
    case, counts = DecodeCase.make([65, 700, 300]), [[64, 1], [0, 672], [37, 288]]
    codes = draw_codes("few", (3, 2, 700))
    check(case, codes, select(case, codes, counts, append_own), counts)
