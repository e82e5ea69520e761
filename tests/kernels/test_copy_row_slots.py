"""The copy of a step's slots: every row's own, whatever its length, and nothing behind."""

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.copy_row_slots import allocate_row_slots, copy_row_slots
from tests.support.decode_case import DecodeCase
from tests.support.interpreter import tune
from tests.support.shapes import DEVICE, needs_kernels

pytestmark = needs_kernels

LENGTHS = [1, 64, 65, 300, 127]


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_copies_the_slots_of_every_key(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks so small that several programs copy a row, each more than once."""
    tune(monkeypatch, "copy_row_slots", block=32, per_row=2)
    case = DecodeCase.make(LENGTHS, page_size=16)
    copy = allocate_row_slots(len(LENGTHS) + 1, case.req_to_token.shape[1], DEVICE).fill_(-1)
    rows = case.rows._replace(requests=case.rows.requests.to(dtype), ends=case.rows.ends.to(dtype))
    copy_row_slots(case.req_to_token, rows, copy)
    expected = reference.copy_row_slots(case.req_to_token, rows.requests.tolist(), LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(copy[row, :length], expected[row])
        assert (copy[row, length:] == -1).all()
    assert (copy[-1] == -1).all()


def test_refuses_more_rows_than_there_is_room_for() -> None:
    case = DecodeCase.make(LENGTHS)
    with pytest.raises(ValueError, match="copy: expected at least 5 rows, got 4"):
        copy_row_slots(case.req_to_token, case.rows, allocate_row_slots(4, 400, DEVICE))
