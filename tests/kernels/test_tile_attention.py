"""Attention of query tiles to selected keys against the float64 reference."""

import math

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.budget import TILE, tile_of
from kascade_kernels.tile_attention import tile_attention
from tests.support.shapes import DEVICE, needs_kernels, shapes
from tests.support.tile_case import TileCase, pack_lists

pytestmark = needs_kernels

EXTENDS = [(270, 301), (0, 33), (128, 129), (90, 127), (0, 1)]
"""Whole tiles, first and last tiles in part, and single queries: 8 rows."""
COUNTS = [201, 0, 32, 100, 64, 63, 65, 0]
"""Keys in the rows' lists: none, all candidates, and around whole steps of 64 keys."""


def attend(
    case: TileCase, lists: list[torch.Tensor], head_map: list[int], out: torch.Tensor | None = None
) -> torch.Tensor:
    return tile_attention(
        case.q,
        case.k,
        case.v,
        case.req_to_token,
        case.rows,
        pack_lists(lists),
        torch.tensor(head_map, dtype=torch.int32, device=DEVICE),
        case.scale,
        out=out,
    )


def exact(case: TileCase, row: int, lists: list[torch.Tensor], head_map: list[int]) -> torch.Tensor:
    """A row's output in float64, [count, Hq, D]."""
    slots = case.slots_of(row)
    own = slots[TILE * tile_of(len(slots) - 1) :]
    pools = (case.queries_of(row).double(), case.k.double(), case.v.double())
    return reference.tile_attention(*pools, lists[row][head_map], own, case.scale)


def eager(case: TileCase, row: int, lists: list[torch.Tensor], head_map: list[int]) -> torch.Tensor:
    """The same in the inputs' own precision."""
    slots, q = case.slots_of(row), case.queries_of(row)
    heads, group = case.k.shape[1], q.shape[1] // case.k.shape[1]
    own = slots[TILE * tile_of(len(slots) - 1) :].expand(heads, -1)
    chosen = torch.cat([lists[row][head_map], own], dim=1)  # [H, keys]
    head = torch.arange(heads, device=DEVICE).unsqueeze(1)
    keys, values = case.k[chosen, head], case.v[chosen, head]
    logits = torch.einsum("nhgd,hld->hgnl", q.unflatten(1, (heads, group)), keys) * case.scale
    seen = torch.ones(len(q), chosen.shape[1], dtype=torch.bool, device=DEVICE)
    weights = logits.masked_fill(~seen.tril(chosen.shape[1] - len(q)), float("-inf")).softmax(-1)
    return torch.einsum("hgnl,hld->nhgd", weights, values).flatten(1, 2)


def check(
    case: TileCase, lists: list[torch.Tensor], head_map: list[int], floor: float = 1e-5
) -> None:
    """Errs no more than eager attention in the same precision, or ``floor``: float32's own."""
    found = attend(case, lists, head_map)
    errors, allowed = [], []
    for row, (_, _, first, count) in enumerate(case.places):
        wanted = exact(case, row, lists, head_map)
        errors.append((found[first : first + count].double() - wanted).abs().max())
        allowed.append((eager(case, row, lists, head_map).double() - wanted).abs().max())
    assert max(errors) <= max(*allowed, floor)


@shapes
@pytest.mark.memcheck
def test_attention(group: int, dim: int, dtype: torch.dtype) -> None:
    case = TileCase.make(EXTENDS, group=group, dim=dim, dtype=dtype)
    check(case, case.draw_lists(COUNTS, heads=2), [0, 1])


@pytest.mark.parametrize("kv_heads, heads, head_map", [(4, 4, [2, 0, 3, 3]), (3, 1, [0, 0, 0])])
def test_head_map(kv_heads: int, heads: int, head_map: list[int]) -> None:
    """Reuse layers borrow lists of other heads; a pooled selection has one list."""
    case = TileCase.make(EXTENDS, kv_heads=kv_heads, group=2)
    check(case, case.draw_lists(COUNTS, heads), head_map)


@pytest.mark.parametrize("dim, page_size", [(16, 1), (64, 16), (128, 32), (256, 64)])
def test_dims_and_pages(dim: int, page_size: int) -> None:
    case = TileCase.make([(96, 129), (33, 130)], kv_heads=1, dim=dim, page_size=page_size)
    check(case, case.draw_lists([70, 33, 9, 64, 95, 128], heads=1), [0])


def test_all_candidates_is_dense_attention() -> None:
    case = TileCase.make([(0, 131)], kv_heads=1, dtype=torch.float32)
    lists = case.draw_lists([TILE * row for row in range(5)], heads=1)
    out = attend(case, lists, [0])
    keys = case.slots_of(4)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (case.q, case.k[keys], case.v[keys])),
        is_causal=True,
        scale=case.scale,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, wanted.transpose(0, 1), atol=2e-6, rtol=0)


def test_other_queries_are_left_alone() -> None:
    case = TileCase.make(EXTENDS)
    lists = case.draw_lists(COUNTS, heads=2)
    whole = attend(case, lists, [1, 0])
    out = torch.full_like(case.q, 7.0)
    assert attend(case.only([1, 4]), [lists[1], lists[4]], [1, 0], out) is out
    for row, (_, _, first, count) in enumerate(case.places):
        part = out[first : first + count]
        assert (
            torch.equal(part, whole[first : first + count]) if row in (1, 4) else (part == 7).all()
        )


def test_out_may_be_strided() -> None:
    case = TileCase.make([(96, 140)])
    lists = case.draw_lists([40, 70], heads=2)
    wide = torch.zeros(*case.q.shape[:2], 2 * case.q.shape[2], dtype=case.q.dtype, device=DEVICE)
    out = attend(case, lists, [0, 1], wide[..., : case.q.shape[2]])
    assert torch.equal(out, attend(case, lists, [0, 1]))
    assert (wide[..., case.q.shape[2] :] == 0).all()


@pytest.mark.parametrize("group", [1, 8])
def test_rows_do_not_depend_on_the_batch(group: int) -> None:
    """Same bits alone, reversed, and with the pool's pages elsewhere."""
    case = TileCase.make(EXTENDS, group=group)
    lists = case.draw_lists(COUNTS, heads=2)
    whole = attend(case, lists, [0, 1])
    rows = range(len(case.places))
    for chosen in [list(reversed(rows)), [1], [3], [5]]:
        part = attend(case.only(chosen), [lists[row] for row in chosen], [0, 1])
        for row in chosen:
            _, _, first, count = case.places[row]
            assert torch.equal(part[first : first + count], whole[first : first + count])
    order = torch.randperm(len(case.k), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    back = order.argsort()
    table = order[case.req_to_token.long()].to(torch.int32)
    moved = TileCase(case.q, case.k[back], case.v[back], table, case.places, case.scale)
    assert torch.equal(attend(moved, [order[slots] for slots in lists], [0, 1]), whole)


def test_lists_of_one_row_differ_in_length() -> None:
    case = TileCase.make(EXTENDS)
    lists = case.draw_lists(COUNTS, heads=2)
    ragged = [[own[0], own[1][: len(own[1]) // 3]] for own in lists]
    for head_map in ([0, 1], [1, 0], [1, 1]):
        found = attend(case, ragged, head_map)
        for row, (_, _, first, count) in enumerate(case.places):
            slots = case.slots_of(row)
            own = slots[TILE * tile_of(len(slots) - 1) :]
            for head, chosen in enumerate(head_map):
                group = slice(4 * head, 4 * head + 4)
                q, k, v = case.queries_of(row)[:, group], case.k[:, [head]], case.v[:, [head]]
                mine = ragged[row][chosen][None]
                exact = (q.double(), k.double(), v.double())
                wanted = reference.tile_attention(*exact, mine, own, case.scale)
                error = (found[first : first + count, group].double() - wanted).abs().max()
                assert error <= 4e-3


@pytest.mark.parametrize("magnitude", [30.0, 1e3])
def test_large_logits_stay_finite(magnitude: float) -> None:
    case = TileCase.make([(96, 140)], spread=magnitude)
    assert attend(case, case.draw_lists([40, 70], heads=2), [0, 1]).isfinite().all()


@pytest.mark.memcheck
@pytest.mark.parametrize("at", [70, 130], ids=["listed", "own"])
@pytest.mark.parametrize("key", [math.inf, -math.inf, math.nan])
def test_infinite_logits_stay_with_their_query(key: float, at: int) -> None:
    """Queries that meet +inf or NaN get NaN; the others of their tile do not."""
    case = TileCase.make([(96, 160)], kv_heads=1)
    lists = case.draw_lists([96, 128], heads=1)
    case.q[..., 0] = case.q[..., 0].abs() + 1
    case.q[::2, :, 0] *= -1
    slot = case.slots_of(1)[at]
    case.k[slot], case.k[slot, :, 0] = 0, key
    out = attend(case, lists, [0])
    wanted = torch.cat([exact(case, row, lists, [0]) for row in range(2)])
    torch.testing.assert_close(out.double(), wanted, atol=4e-3, rtol=0, equal_nan=True)
    sees = torch.arange(96, 160, device=DEVICE)[:, None] >= at
    met = sees & ~(case.q[..., 0] * key < 0)
    assert torch.equal(out.isnan(), met[..., None].expand_as(out))


def test_queries_that_see_no_key_get_zeros() -> None:
    case = TileCase.make([(96, 140)], kv_heads=1)
    case.q.abs_().add_(1)
    case.k.fill_(-math.inf)
    assert (attend(case, case.draw_lists([40, 70], heads=1), [0]) == 0).all()


def test_refusals() -> None:
    case = TileCase.make([(96, 128)])
    lists = case.draw_lists([40], heads=2)
    packed = pack_lists(lists)
    head_map = torch.zeros(2, dtype=torch.int32, device=DEVICE)

    def run(**changes: object) -> None:
        arguments = {"v_cache": case.v, "lists": packed, "head_map": head_map, "scale": 1.0}
        tile_attention(
            case.q, case.k, req_to_token=case.req_to_token, rows=case.rows, **arguments | changes
        )

    with pytest.raises(ValueError, match=r"v_cache: expected shape \[129, 2, 32\]"):
        run(v_cache=case.v[1:])
    with pytest.raises(ValueError, match="head_map: expected int32, got int64"):
        run(head_map=head_map.long())
    with pytest.raises(ValueError, match=r"head_map: expected shape \[2\], got \[1\]"):
        run(head_map=head_map[:1])
    with pytest.raises(ValueError, match="lists.offsets: expected int64, got int32"):
        run(lists=packed._replace(offsets=packed.offsets.int()))
    with pytest.raises(ValueError, match=r"lists.counts: expected shape \[1, any\], got \[2, 2\]"):
        run(lists=packed._replace(counts=packed.counts.repeat(2, 1)))
    with pytest.raises(ValueError, match="lists: expected 1 or 2 a row, got 4"):
        run(lists=packed._replace(counts=packed.counts.repeat(1, 2)))
    with pytest.raises(ValueError, match="scale: expected a positive number, got -1.0"):
        run(scale=-1.0)
