"""Scores and selection of candidate pools against the float64 reference."""

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import TILE, Budget, PoolRule, tile_of
from kascade_kernels.codes import decode
from kascade_kernels.decode_lists import Budgets, Spans, decode_lists
from kascade_kernels.decode_scores import ScoreScratch
from kascade_kernels.merge_parts import Parts
from kascade_kernels.select_slots import select_slots
from kascade_kernels.structs import KeyCopy, Lists, Pool
from kascade_kernels.tuning import STEP
from tests.support.decode_case import DecodeCase, PoolCase, list_of, lists_of
from tests.support.shapes import DEVICE, needs_kernels, shapes

pytestmark = needs_kernels

BUDGET = Budget(0.1, 64)
LENGTHS = [1, 32, 33, 65, 129, 301, 700]
DTYPES = [torch.float16, torch.bfloat16]


def run(
    pool: PoolCase, copy: KeyCopy | None = None, budget: Budget = BUDGET
) -> tuple[Lists, ScoreScratch]:
    """Score pools and select of them."""
    case, per_row = pool.case, pool.keys.lists.per_row
    rows, q_heads, dim = case.q.shape
    lists = case.lists(pool.counts(per_row, budget), append_own=True)
    room = max(pool.lengths)
    scratch = ScoreScratch.allocate(rows, q_heads, per_row, room, empty_on(DEVICE))
    spans = case.spans(budget)
    keys = case.k if copy is None else copy
    case.score(keys, spans, lists, scratch, Parts.allocate(spans, q_heads, dim), pool=pool)
    where = (scratch.codes, case.req_to_token, pool.rows, lists)
    select_slots(*where, append_own=True, pool=pool.keys)
    return lists, scratch


def eager_scores(pool: PoolCase, row: int) -> torch.Tensor:
    """The same scores in the inputs' own precision, [H, keys before the own tile]."""
    case, slots = pool.case, pool.slots_of(row)
    heads = torch.arange(len(slots), device=DEVICE).unsqueeze(1)
    q = case.q[row].view(len(slots), -1, case.q.shape[-1])
    logits = torch.einsum("hgd,hld->hgl", q, case.k[slots, heads]) * case.scale
    return logits.softmax(-1)[:, :, : slots.shape[1] - case.own(row)].sum(1)


def check(pool: PoolCase, selection: Lists, budget: Budget = BUDGET) -> None:
    """Lists are in the order of the pool, hold the own tile, and no less mass than eager ones."""
    for row, length in enumerate(pool.case.lengths):
        wanted, slots = budget.selected(tile_of(length - 1)), pool.slots_of(row)
        scores, eager = pool.scores(row), eager_scores(pool, row).float()
        if selection.per_row == 1:
            slots, scores, eager = slots[:1], *(x.sum(0, keepdim=True) for x in (scores, eager))
        own = pool.case.own(row)
        for head, found in enumerate(lists_of(selection, row)):
            assert torch.equal(found[wanted:], slots[head, -own:])
            in_order = slots[head].sort()
            places = in_order.indices[torch.searchsorted(in_order.values, found[:wanted])]
            assert torch.equal(slots[head][places], found[:wanted])
            assert (places.diff() > 0).all(), "ascending, none twice"
            best = scores[head].topk(wanted).values.sum()
            theirs = scores[head][eager[head].topk(wanted).indices].sum()
            assert best - scores[head][places].sum() <= best - theirs + 1e-3 * best


@pytest.mark.memcheck
@shapes
def test_selects_what_the_reference_selects(group: int, dim: int, dtype: torch.dtype) -> None:
    per_row = 1 if group in (4, 7, 16) else 2
    case = DecodeCase.make(LENGTHS, group=group, dim=dim, dtype=dtype, page_size=16)
    pool = PoolCase.make(case, 6, per_row)
    selection, _ = run(pool)
    check(pool, selection)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_scores(dtype: torch.dtype) -> None:
    pool = PoolCase.make(DecodeCase.make([301, 700], dtype=dtype, kv_heads=3), 5, 3)
    _, scratch = run(pool)
    for row in range(2):
        exact = pool.scores(row)
        found = decode(scratch.codes.codes[row, :, : exact.shape[1]]).double()
        eager = eager_scores(pool, row).double()
        error, eager_error = ((x - exact).abs().max() for x in (found, eager))
        assert error <= eager_error + 1e-3 * exact.max()


@pytest.mark.memcheck
def test_scores_of_eight_bit_keys_recover_the_mass() -> None:
    case = DecodeCase.make([700, 333], dim=64)
    copy = case.key_copy()
    pool = PoolCase.make(case, 8, 2)
    selection, _ = run(pool, copy)
    for row, length in enumerate(case.lengths):
        wanted, scores = BUDGET.selected(tile_of(length - 1)), pool.scores(row)
        for head, found in enumerate(lists_of(selection, row)):
            taken = torch.isin(pool.slots_of(row)[head][: scores.shape[1]], found)
            best = scores[head].topk(wanted).values.sum()
            assert scores[head][taken].sum() >= 0.99 * best


def test_pool_of_all_keys_changes_nothing() -> None:
    """Codes and lists are those of the slot table, to the bit."""
    case = DecodeCase.make([700, 333, 40])
    pool = PoolCase.make(case, 700, 2)
    heads = pool.keys.head_map.flip(0)  # Equal for pools that are: each head's own.
    pool.keys = pool.keys._replace(head_map=heads)
    assert pool.lengths == case.lengths
    in_pool, scratch = run(pool)
    lists = case.lists(case.counts(2, BUDGET), append_own=True)
    whole = ScoreScratch.allocate(3, case.q.shape[1], 2, 700, empty_on(DEVICE))
    spans = case.spans(BUDGET)
    case.score(case.k, spans, lists, whole, Parts.allocate(spans, case.q.shape[1], 32))
    select_slots(whole.codes, case.req_to_token, case.rows, lists, append_own=True)
    for row, length in enumerate(case.lengths[:2]):
        before = TILE * tile_of(length - 1)
        codes = (each.codes.codes[row, :, :before].int() for each in (scratch, whole))
        assert torch.equal(*codes)
    for row in range(3):
        for head in range(2):
            assert torch.equal(list_of(in_pool, row, head), list_of(lists, row, head))


@pytest.mark.memcheck
def test_a_maker_selects_twice_by_the_same_codes() -> None:
    """First a list, then a longer one: the pool."""
    case, lengths = DecodeCase.make([700, 5000, 65]), [700, 5000, 65]
    lists = case.lists(case.counts(2, BUDGET), append_own=True)
    rule = PoolRule(0.3)
    counts = [[rule.pooled(tile_of(length - 1), BUDGET)] * 2 for length in lengths]
    pool = case.lists(counts, append_own=True)
    scratch = ScoreScratch.allocate(3, case.q.shape[1], 2, 5000, empty_on(DEVICE))
    spans = case.spans(BUDGET)
    case.score(case.k, spans, lists, scratch, Parts.allocate(spans, case.q.shape[1], 32))
    for filled in (lists, pool):
        select_slots(scratch.codes, case.req_to_token, case.rows, filled, append_own=True)
    for row, length in enumerate(lengths[:2]):
        before, slots = TILE * tile_of(length - 1), case.slots_of(row)
        for head in range(2):
            codes = scratch.codes.codes[row, head : head + 1, :before].int()
            for filled, count in ((lists, BUDGET.selected(before // TILE)), (pool, counts[row][0])):
                best = reference.select_slots(codes, slots, count)[0]
                assert torch.equal(list_of(filled, row, head), torch.cat([best, slots[before:]]))
    assert torch.equal(list_of(pool, 2, 0), case.slots_of(2))


@pytest.mark.memcheck
@pytest.mark.parametrize("share", [0.01, 0.25, 0.3333333, 0.9])
def test_lengths_of_pools_are_the_host_s(share: float) -> None:
    lengths = [*range(1, 700, 3), 1280, 4095, 4096, 4097, 65536, 131072, 2**20]
    budgets = [BUDGET, Budget(0.1, 1024), Budget(1.0, 64)] * len(lengths)
    lengths, rule = [length for length in lengths for _ in range(3)], PoolRule(share)
    rows = len(lengths)
    spans = Spans.allocate(rows, 8, DEVICE)
    counts, ends, pool_spans = (
        torch.empty(*shape, dtype=torch.int32, device=DEVICE)
        for shape in ((rows, 2), (rows,), (rows,))
    )
    offsets = torch.zeros(rows, 2, dtype=torch.int64, device=DEVICE)
    pool = Pool(Lists(ends, offsets, torch.empty_like(counts)), ends, pool_spans)
    asked = Budgets.of(budgets[:rows], DEVICE)
    where = torch.tensor(lengths, device=DEVICE)
    decode_lists(where, 8, asked, spans, counts, pool=pool, rule=rule)
    for row, (length, budget) in enumerate(zip(lengths, budgets, strict=False)):
        tile = tile_of(length - 1)
        pooled = rule.pooled(tile, budget)
        assert budget.selected(tile) <= pooled <= TILE * tile and pooled % TILE == 0
        expected = pooled + length - TILE * tile
        assert pool.lists.counts[row].tolist() == [expected] * 2
        assert int(ends[row]) == expected <= STEP * int(pool_spans[row]) * spans.score_splits


def test_pools_of_other_shapes_are_refused() -> None:
    pool = PoolCase.make(DecodeCase.make([301]), 5, 2)
    pool.keys = pool.keys._replace(head_map=pool.keys.head_map[:1])
    with pytest.raises(ValueError, match=r"pool.head_map: expected shape \[2\], got \[1\]"):
        run(pool)
    pool = PoolCase.make(DecodeCase.make([301]), 5, 1)
    pool.keys = pool.keys._replace(lists=pool.case.lists([[64] * 2], append_own=True))
    case = pool.case
    lists = case.lists([[64]], append_own=True)
    scratch = ScoreScratch.allocate(1, 8, 1, 301, empty_on(DEVICE))
    spans = case.spans(BUDGET)
    with pytest.raises(ValueError, match="lists: expected 1 a row, got 2"):
        case.score(case.k, spans, lists, scratch, Parts.allocate(spans, 8, 32), pool=pool)
