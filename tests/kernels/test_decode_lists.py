"""How long a decode step's lists are, and how it is cut into programs."""

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.budget import Budget, tile_of
from kascade_kernels.decode_lists import Budgets, Spans, decode_lists
from kascade_kernels.tuning import STEP
from tests.support.shapes import DEVICE, needs_kernels

pytestmark = needs_kernels

BUDGET = Budget(0.1, 128)


@pytest.fixture
def few_programs() -> None:
    """Here as many programs as on a GPU."""


def cut(lengths: list[int], heads: int, batch_invariant: bool = False) -> Spans:
    spans = Spans.allocate(len(lengths), heads, DEVICE, batch_invariant=batch_invariant)
    ends = torch.tensor(lengths, device=DEVICE)
    counts = torch.empty(len(lengths), 1, dtype=torch.int32, device=DEVICE)
    budgets = Budgets.of([BUDGET] * len(lengths), DEVICE)
    decode_lists(ends, heads, budgets, spans, counts, batch_invariant=batch_invariant)
    return spans


@pytest.mark.memcheck
@pytest.mark.parametrize("per_row", [1, 3, 8])
@pytest.mark.parametrize(
    "budget",
    [BUDGET, Budget(0.1, 64), Budget(1.0, 64), Budget(0.00397, 96), Budget(0.333333, 4096)],
    ids=str,
)
def test_counts_are_the_host_s_budget(budget: Budget, per_row: int) -> None:
    """At every length up to 700, and around tiles and where the ratio sets in, to 1M."""
    far = [n + off for n in (1280, 4096, 65536, 131072, 2**20) for off in (-33, -32, -1, 0, 1, 32)]
    lengths = [*range(1, 700), *far]
    ends = torch.tensor(lengths, device=DEVICE)
    spans = Spans.allocate(len(lengths), 8, DEVICE)
    counts = torch.empty(len(lengths), per_row, dtype=torch.int32, device=DEVICE)
    budgets = [budget] * len(lengths)
    decode_lists(ends, 8, Budgets.of(budgets, DEVICE), spans, counts)
    expected = torch.tensor(reference.decode_lists(lengths, budgets))
    assert torch.equal(counts.cpu().long(), expected[:, None].expand(-1, per_row))


@pytest.mark.memcheck
def test_each_row_has_its_own_budget() -> None:
    budgets = [BUDGET, Budget(1.0, 64), Budget(0.25, 96), Budget(0.01, 4096)] * 3
    lengths = [5000, 5000, 5000, 5000, 70, 70, 70, 70, 2**20, 2**20 - 1, 2**20, 9000]
    ends = torch.tensor(lengths, device=DEVICE)
    spans = Spans.allocate(len(lengths), 8, DEVICE)
    counts = torch.empty(len(lengths), 2, dtype=torch.int32, device=DEVICE)
    decode_lists(ends, 8, Budgets.of(budgets, DEVICE), spans, counts)
    expected = reference.decode_lists(lengths, budgets)
    assert counts.tolist() == [[count, count] for count in expected]
    for row, listed in enumerate(expected):
        assert STEP * int(spans.attend[row]) * spans.attend_splits >= listed


def test_budgets_of_fewer_rows_are_refused() -> None:
    spans = Spans.allocate(2, 8, DEVICE)
    counts = torch.empty(2, 1, dtype=torch.int32, device=DEVICE)
    ends, budgets = torch.ones(2, device=DEVICE), Budgets.of([BUDGET], DEVICE)
    with pytest.raises(ValueError, match=r"budgets.ratios_ppm: expected shape \[2\], got \[1\]"):
        decode_lists(ends, 8, budgets, spans, counts)


def test_counts_of_another_shape_are_refused() -> None:
    spans = Spans.allocate(2, 8, DEVICE)
    counts = torch.empty(3, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"counts: expected shape \[2, any\], got \[3, 1\]"):
        budgets = Budgets.of([BUDGET] * 2, DEVICE)
        decode_lists(torch.ones(2, device=DEVICE), 8, budgets, spans, counts)


@pytest.mark.parametrize("heads", [1, 2, 8, 2000])
@pytest.mark.parametrize("lengths", [[1], [131072], [256, 65536, 1], [8192] * 64], ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_key_has_a_program(heads: int, lengths: list[int], batch_invariant: bool) -> None:
    spans = cut(lengths, heads, batch_invariant)
    for row, length in enumerate(lengths):
        listed = BUDGET.selected(tile_of(length - 1)) + (length - 1) % 32 + 1
        assert STEP * int(spans.score[row]) * spans.score_splits >= length
        assert STEP * int(spans.attend[row]) * spans.attend_splits >= listed


@pytest.mark.memcheck
def test_long_rows_of_a_mixed_batch_get_more_programs() -> None:
    spans = cut([65536] + [256] * 31, 8)
    assert 65536 // (STEP * int(spans.score[0])) >= 32


def test_invariant_spans_ignore_the_batch() -> None:
    together, alone = cut([65536, 300, 4000], 8, True), cut([4000], 8, True)
    assert torch.equal(together.score[2:], alone.score)
    assert torch.equal(together.attend[2:], alone.attend)
