"""Rows that begin with the same slots: which are found, and that scoring them together is exact."""

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import Budget
from kascade_kernels.decode_scores import ScoreScratch
from kascade_kernels.find_shared_prefixes import SharedPrefix, find_shared_prefixes
from kascade_kernels.launch import padded_group
from kascade_kernels.merge_parts import Parts
from kascade_kernels.select_slots import select_slots
from kascade_kernels.structs import KeyCopy, Lists
from tests.support.decode_case import DecodeCase, lists_of
from tests.support.interpreter import tune
from tests.support.shapes import DEVICE, needs_kernels, shapes

pytestmark = needs_kernels

BUDGET = Budget(0.1, 64)
LENGTHS = [160, 100, 200, 199, 40, 200, 64, 150, 201]
SHARING = {(0, 2, 3, 5, 8): 140, (1, 7): 99, (4, 6): 1}
"""Rows of LENGTHS that begin alike, and up to where."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several programs compare a row, each more than once."""
    tune(monkeypatch, "compare_slots", block=64, per_row=2)


def sharing_case(**others: object) -> DecodeCase:
    case = DecodeCase.make(LENGTHS, **others)
    for rows, keys in SHARING.items():
        case.share(list(rows), keys)
    return case


def expected_groups(sharing: dict, most: int) -> dict[tuple[int, ...], int]:
    """Rows cut into groups of ``most`` in the batch's order, and the keys each has in common."""
    groups = {}
    for rows, keys in sharing.items():
        for first in range(0, len(rows), most):
            group = rows[first : first + most]
            if len(group) > 1:
                groups[group] = min(keys, *(LENGTHS[row] for row in group))
    return groups


@pytest.mark.memcheck
@pytest.mark.parametrize("group", [1, 4, 5, 8, 16])
def test_finds_what_rows_share(group: int) -> None:
    case = sharing_case(group=group)
    shared = case.shared(case.spans(BUDGET))
    most = padded_group(group) // group
    keys, members = [0] * len(LENGTHS), [[-1] * most for _ in LENGTHS]
    for row in range(len(LENGTHS)):
        members[row][0] = row
    for rows, count in expected_groups(SHARING, most).items():
        for row in rows:
            keys[row], members[row] = count, [-1] * most
        members[rows[0]][: len(rows)] = rows
    assert shared.keys.tolist() == keys
    if most > 1:
        assert shared.members.tolist() == members
    slots = [case.slots_of(row) for row in range(len(LENGTHS))]
    found, groups = reference.find_shared_prefixes(slots, most)
    assert found == keys
    assert sorted(groups) == sorted(
        tuple(m for m in own if m >= 0) for own in members if max(own) >= 0
    )


def test_a_later_step_forgets_the_groups_of_an_earlier_one() -> None:
    case = sharing_case()
    spans = case.spans(BUDGET)
    shared = case.shared(spans)
    case.req_to_token = DecodeCase.make(LENGTHS).req_to_token
    find_shared_prefixes(case.req_to_token, case.rows, spans, shared)
    assert not shared.keys.any() and (shared.members[:, 1:] == -1).all()


def test_a_short_row_of_the_same_request_ends_what_is_shared() -> None:
    """All of the shorter prompt is the beginning of the longer one.

    Behind it the table holds what another request left there, which may be the same slots.
    """
    case = DecodeCase.make([96, 300])
    short, long = case.rows.requests.tolist()
    case.req_to_token[short] = case.req_to_token[long]
    assert case.shared(case.spans(BUDGET)).keys.tolist() == [96, 96]


def test_rows_that_are_cut_otherwise_make_no_group() -> None:
    """Where results must not depend on the batch, a row's own length alone says how."""
    case = DecodeCase.make([2000, 700, 701], kv_heads=1)
    case.share([0, 1, 2], 600)
    spans = case.spans(BUDGET, batch_invariant=True)
    assert case.shared(spans).keys.tolist() == [0, 600, 600]


def score(
    case: DecodeCase,
    shared: SharedPrefix,
    keys: torch.Tensor | KeyCopy,
    values: torch.Tensor | None = None,
) -> tuple[Lists, ScoreScratch, torch.Tensor | None]:
    rows, q_heads, dim = case.q.shape
    per_row = case.k.shape[1]
    lists = case.lists(case.counts(per_row, BUDGET), append_own=True)
    scratch = ScoreScratch.allocate(rows, q_heads, per_row, max(LENGTHS), empty_on(DEVICE))
    scratch.codes.codes.zero_()
    spans = case.spans(BUDGET)
    parts = Parts.allocate(spans, q_heads, dim)
    out = case.score(keys, spans, lists, scratch, parts, values, shared)
    select_slots(scratch.codes, case.req_to_token, case.rows, lists, append_own=True)
    return lists, scratch, out


def check_together(
    case: DecodeCase, keys: torch.Tensor | KeyCopy, values: torch.Tensor | None = None
) -> None:
    """Score rows in groups and each alone, and compare every bit."""
    nothing = SharedPrefix.allocate(len(LENGTHS), case.q.shape[1] // case.k.shape[1], DEVICE)
    together = score(case, case.shared(case.spans(BUDGET)), keys, values)
    alone = score(case, nothing, keys, values)
    assert torch.equal(together[1].codes.codes, alone[1].codes.codes)
    for row in range(len(LENGTHS)):
        assert torch.equal(lists_of(together[0], row), lists_of(alone[0], row))
    if values is not None:
        tolerance = 0 if DEVICE == "cuda" else 0.02
        torch.testing.assert_close(together[2], alone[2], rtol=0, atol=tolerance)


@shapes
@pytest.mark.memcheck
def test_scores_the_same_together_as_alone(group: int, dim: int, dtype: torch.dtype) -> None:
    case = sharing_case(group=group, dim=dim, dtype=dtype, page_size=16)
    if DEVICE == "cpu":
        # The interpreter's sums depend on a row's place in a product; those of integers do not.
        case.q, case.k, case.v = case.q.round(), case.k.round(), case.v.round()
    check_together(case, case.k, case.v)


@pytest.mark.memcheck
def test_scores_8_bit_keys_the_same_together_as_alone() -> None:
    case = sharing_case()
    copy = case.key_copy()
    check_together(case, copy)
