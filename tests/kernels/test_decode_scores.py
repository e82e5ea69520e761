"""Decode scores and their exact selection against the float64 reference."""

import math

import pytest
import torch

from kascade_kernels.arena import empty_on
from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.codes import decode
from kascade_kernels.decode_scores import ScoreScratch, decode_scores
from kascade_kernels.merge_parts import Parts
from kascade_kernels.select_slots import select_slots
from kascade_kernels.structs import KeyCopy, Lists, Rows
from tests.support.decode_case import DecodeCase, list_of, lists_of
from tests.support.interpreter import tune
from tests.support.shapes import DEVICE, needs_kernels, shapes

pytestmark = needs_kernels

BUDGET = Budget(0.1, 64)
LENGTHS = [1, 31, 32, 33, 64, 65, 129, 301, 700]
DTYPES = [torch.float16, torch.bfloat16]
POOLED = pytest.mark.parametrize("pooled", [False, True], ids=["per_head", "pooled"])


def run(
    case: DecodeCase,
    budget: Budget = BUDGET,
    pooled: bool = False,
    copy: KeyCopy | None = None,
    attend: bool = False,
    batch_invariant: bool = False,
    counts: list[list[int]] | None = None,
    v_scale: float | None = None,
) -> tuple[Lists, torch.Tensor | None, ScoreScratch]:
    rows, q_heads, dim = case.q.shape
    per_row = 1 if pooled else case.k.shape[1]
    lists = case.lists(counts or case.counts(per_row, budget), append_own=True)
    scratch = ScoreScratch.allocate(rows, q_heads, per_row, max(case.lengths), empty_on(DEVICE))
    spans = case.spans(budget, batch_invariant)
    parts = Parts.allocate(spans, q_heads, dim)
    keys = case.k if copy is None else copy
    values = case.v if attend else None
    out = case.score(keys, spans, lists, scratch, parts, values, v_scale=v_scale)
    select_slots(scratch.codes, case.req_to_token, case.rows, lists, append_own=True)
    return lists, out, scratch


def positions(case: DecodeCase, row: int, slots: torch.Tensor) -> torch.Tensor:
    """Translate a row's slots back to positions."""
    table = case.slots_of(row)
    where = torch.full((int(table.max()) + 1,), -1, dtype=torch.int64, device=DEVICE)
    where[table] = torch.arange(len(table), device=DEVICE)
    return where[slots]


def eager_scores(case: DecodeCase, row: int, pooled: bool) -> torch.Tensor:
    """The same scores computed in the inputs' own precision."""
    keys = case.k[case.slots_of(row)]
    kv_heads, own = keys.shape[1], (case.lengths[row] - 1) // TILE * TILE
    q = case.q[row].view(kv_heads, -1, case.q.shape[-1])
    logits = torch.einsum("hgd,lhd->hgl", q, keys) * case.scale
    scores = logits.softmax(-1)[:, :, :own].sum(1)
    return scores.sum(0, keepdim=True) if pooled else scores


def check_selection(case: DecodeCase, selection: Lists, budget: Budget, pooled: bool) -> None:
    for row, length in enumerate(case.lengths):
        tile = tile_of(length - 1)
        found = positions(case, row, lists_of(selection, row))
        wanted = budget.selected(tile)
        own = torch.arange(TILE * tile, length, device=DEVICE)
        assert found.shape[1] == wanted + len(own)
        assert (found.diff(dim=1) > 0).all(), "ascending, none twice"
        assert torch.equal(found[:, wanted:], own.expand(len(found), -1))
        exact = case.scores(row, pooled)
        best = exact.topk(wanted, dim=1).values.sum(1)
        eager = eager_scores(case, row, pooled).float().topk(wanted, dim=1).indices
        lost = best - exact.gather(1, found[:, :wanted]).sum(1)
        eager_lost = best - exact.gather(1, eager).sum(1)
        assert (lost <= eager_lost + 1e-3 * best).all()


@shapes
@pytest.mark.memcheck
def test_selects_what_the_reference_selects(group: int, dim: int, dtype: torch.dtype) -> None:
    pooled = group in (4, 7, 16)
    case = DecodeCase.make(LENGTHS, group=group, dim=dim, dtype=dtype, page_size=16)
    selection, _, _ = run(case, pooled=pooled)
    check_selection(case, selection, BUDGET, pooled)


@POOLED
def test_around_the_edges_of_the_default_budget(pooled: bool) -> None:
    """Up to 128 keys all are selected; from the tile of position 1280 on the ratio decides."""
    case, budget = DecodeCase.make([127, 128, 129, 1280, 1281], kv_heads=3, page_size=32), Budget()
    selection, _, _ = run(case, budget, pooled)
    check_selection(case, selection, budget, pooled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_scores(dtype: torch.dtype) -> None:
    case = DecodeCase.make([301, 700], dtype=dtype)
    _, _, scratch = run(case)
    for row, length in enumerate(case.lengths):
        own = (length - 1) // TILE * TILE
        found = decode(scratch.codes.codes[row, :, :own]).double()
        exact = case.scores(row)
        eager = eager_scores(case, row, False).double()
        error, eager_error = ((x - exact).abs().max() for x in (found, eager))
        assert error <= eager_error + 1e-3 * exact.max()


@pytest.mark.memcheck
def test_eight_bit_keys_recover_the_mass() -> None:
    case = DecodeCase.make([700, 333], dim=64)
    copy = case.key_copy()
    selection, _, _ = run(case, copy=copy)
    for row in range(2):
        wanted = BUDGET.selected(tile_of(case.lengths[row] - 1))
        found = positions(case, row, lists_of(selection, row))[:, :wanted]
        exact = case.scores(row)
        best = exact.topk(wanted, dim=1).values.sum(1)
        assert (exact.gather(1, found).sum(1) >= 0.995 * best).all()


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attends_to_everything_in_the_same_pass(dtype: torch.dtype) -> None:
    case = DecodeCase.make(LENGTHS, dtype=dtype)
    alone, _, _ = run(case)
    selection, out, _ = run(case, attend=True)
    assert torch.equal(selection.slots, alone.slots)
    for row in range(len(LENGTHS)):
        slots = case.slots_of(row)
        q, k, v = case.q[row], case.k[slots], case.v[slots]

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q = q.view(k.shape[1], -1, q.shape[-1])
            weights = (torch.einsum("hgd,lhd->hgl", q, k) * case.scale).softmax(-1)
            return torch.einsum("hgl,lhd->hgd", weights, v).reshape(-1, q.shape[-1])

        exact = attention(q.double(), k.double(), v.double())
        eager_error = (attention(q, k, v).double() - exact).abs().max()
        assert (out[row].double() - exact).abs().max() <= eager_error + 1e-4


def test_ties_go_to_the_lower_position() -> None:
    case = DecodeCase.make([300], dtype=torch.float16)
    case.k.zero_()
    selection, _, _ = run(case)
    found = positions(case, 0, lists_of(selection, 0))
    wanted = BUDGET.selected(tile_of(299))
    assert torch.equal(found[:, :wanted], torch.arange(wanted, device=DEVICE).expand(2, -1))


@pytest.mark.parametrize("key", [300.0, 60000.0, math.inf, -math.inf])
def test_huge_logits(key: float) -> None:
    """A key that takes all of the mass, and one that takes none."""
    case = DecodeCase.make([300, 65])
    case.k[case.slots_of(0)[40]] = key
    case.q[0] = case.q[0].abs()
    selection, out, _ = run(case, attend=True)
    found = positions(case, 0, lists_of(selection, 0))
    assert ((found == 40).any(1) == (key > 0)).all()
    assert out.isfinite().all(1).all(1).tolist() == [key < math.inf, True]


def test_rows_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few that, but for ``batch_invariant``, a row's share would depend on the others.
    tune(monkeypatch, "score", programs=8)
    case = DecodeCase.make(LENGTHS)
    together, out, _ = run(case, attend=True, batch_invariant=True)
    alone = DecodeCase(
        case.q[7:8],
        case.k,
        case.v,
        case.req_to_token,
        Rows(case.rows.requests[7:8], case.rows.ends[7:8]),
        [301],
        case.scale,
    )
    single, out_alone, _ = run(alone, attend=True, batch_invariant=True)
    assert torch.equal(lists_of(single, 0), lists_of(together, 7))
    assert torch.equal(out_alone[0], out[7])


def test_more_rows_than_the_scratch_holds() -> None:
    case = DecodeCase.make([40, 50])
    scratch = ScoreScratch.allocate(1, 8, 2, 50, empty_on(DEVICE))
    table, rows, spans = case.req_to_token, case.rows, case.spans(BUDGET)
    parts = Parts.allocate(spans, 8, 32)
    with pytest.raises(ValueError, match="at most 1 rows, got 2"):
        shared = case.shared(spans)
        lists = case.lists(case.counts(2, BUDGET), append_own=True)
        decode_scores(case.q, case.k, table, rows, lists, spans, shared, case.scale, scratch, parts)


def test_heads_of_one_row_may_ask_for_lists_of_different_lengths() -> None:
    """One head of row 0 and the other of row 1 hold everything, so they need no scores."""
    case, counts = DecodeCase.make([301, 700]), [[288, 40], [7, 672]]
    lists, out, _ = run(case, attend=True, counts=counts)
    same, dense, _ = run(case, attend=True)
    assert torch.equal(out, dense)
    for row, length in enumerate(case.lengths):
        exact = case.scores(row)
        for head, count in enumerate(counts[row]):
            found = positions(case, row, list_of(lists, row, head))
            own = torch.arange(length - case.own(row), length, device=DEVICE)
            assert torch.equal(found[count:], own) and (found.diff() > 0).all()
            best = exact[head].topk(count).values.sum()
            assert exact[head][found[:count]].sum() >= (1 - 1e-3) * best
