"""How decode steps are cut into programs."""

import pytest
import torch

from kascade_kernels.budget import Budget, tile_of
from kascade_kernels.decode_spans import STEP, Spans, decode_spans
from shapes import DEVICE, needs_kernels

pytestmark = needs_kernels

BUDGET = Budget(0.1, 128)


@pytest.fixture
def few_programs() -> None:
    """Here as many programs as on a GPU."""


def cut(lengths: list[int], heads: int, batch_invariant: bool = False) -> Spans:
    spans = Spans.allocate(len(lengths), heads, DEVICE, batch_invariant=batch_invariant)
    ends = torch.tensor(lengths, device=DEVICE)
    decode_spans(ends, heads, BUDGET, spans, batch_invariant=batch_invariant)
    return spans


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
