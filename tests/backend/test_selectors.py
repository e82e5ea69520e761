"""Every selector against its rule, written out with loops over queries, heads and keys."""

import math

import pytest
import torch

from kascade_kernels.budget import TILE
from kascade_sglang.backend.selectors import SELECTORS, SINKS, Case
from kascade_sglang.sparsity import QUEST_PAGE

KV_HEADS = 2
SHAPES = pytest.mark.parametrize(
    "n, candidates, count",
    [(1, 96, 33), (1, 320, 96), (7, 128, 71), (32, 256, 100)],
    ids=lambda value: str(value),
)
GROUPS = pytest.mark.parametrize("group", [1, 4])


def draw(n: int, candidates: int, count: int, group: int = 4, pooled: bool = False) -> Case:
    """A case of float64 tensors; one query is one that decodes in the middle of its tile."""
    generator = torch.Generator().manual_seed(1000 * n + candidates + group)
    length = candidates + (n if n > 1 else 5)
    q = torch.randn(n, KV_HEADS * group, 16, generator=generator, dtype=torch.float64)
    keys = torch.randn(length, KV_HEADS, 16, generator=generator, dtype=torch.float64)
    return Case(2 * q, keys, count, 3, 0.25, pooled)


def probabilities(case: Case, query: int, q_head: int) -> list[float]:
    """One query's attention to the keys before the tile, by the formula."""
    head = q_head // (case.q.shape[1] // KV_HEADS)
    seen = range(len(case.keys) - len(case.q) + query + 1)
    exponents = [
        math.exp(case.scale * float(case.q[query, q_head] @ case.keys[key, head])) for key in seen
    ]
    return [exponent / sum(exponents) for exponent in exponents[: case.candidates]]


def best(scores: list[float], count: int) -> list[int]:
    """Numbers of the greatest scores, greatest first, ties to the lower."""
    return sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:count]


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("pooled", [False, True], ids=["per_head", "pooled"])
@SHAPES
def test_lists_hold_the_budget(
    name: str, pooled: bool, n: int, candidates: int, count: int
) -> None:
    case = draw(n, candidates, count, pooled=pooled)
    found = SELECTORS[name](case)
    assert found.dtype == torch.int64 and found.shape[0] in (1, KV_HEADS)
    assert found.shape[1] == count
    assert (found.diff(dim=1) > 0).all(), "ascending, each key once"
    assert found.min() >= 0 and found.max() < candidates
    if name in ("omnikv", "lessismore") or pooled and name in ("topk", "quest"):
        assert len(found) == 1


@SHAPES
@GROUPS
@pytest.mark.parametrize("pooled", [False, True], ids=["per_head", "pooled"])
def test_quest(n: int, candidates: int, count: int, group: int, pooled: bool) -> None:
    case = draw(n, candidates, count, group, pooled)
    pages = candidates // QUEST_PAGE
    scores = [[0.0] * pages for _ in range(KV_HEADS)]
    for q_head in range(KV_HEADS * group):
        head = q_head // group
        for query in case.q[:, q_head]:
            exponents = []
            for page in range(pages):
                keys = case.keys[QUEST_PAGE * page : QUEST_PAGE * (page + 1), head]
                ends = zip(query.tolist(), keys.T.tolist(), strict=True)
                bound = sum(max(x * min(channel), x * max(channel)) for x, channel in ends)
                exponents.append(math.exp(case.scale * bound))
            for page in range(pages):
                scores[head][page] += exponents[page] / sum(exponents)
    if pooled:
        scores = [[sum(column) for column in zip(*scores, strict=True)]]
    for head, found in enumerate(SELECTORS["quest"](case).tolist()):
        expected = []
        for page in best(scores[head], pages):
            expected += range(QUEST_PAGE * page, QUEST_PAGE * (page + 1))
        assert found == sorted(expected[:count]), "the last page is cut"


@SHAPES
@GROUPS
def test_omnikv(n: int, candidates: int, count: int, group: int) -> None:
    case = draw(n, candidates, count, group)
    scores = [0.0] * candidates
    for query in range(n):
        rows = [probabilities(case, query, q_head) for q_head in range(KV_HEADS * group)]
        greatest = [max(column) for column in zip(*rows, strict=True)]
        scores = [a + b for a, b in zip(scores, greatest, strict=True)]
    assert SELECTORS["omnikv"](case).tolist() == [sorted(best(scores, count))]


@SHAPES
@GROUPS
def test_lessismore(n: int, candidates: int, count: int, group: int) -> None:
    case = draw(n, candidates, count, group)
    budget = count + TILE
    middle = int(0.75 * budget)
    recent = max(budget - middle - SINKS - TILE, 0)
    middle = count - SINKS - recent
    chosen: list[int] = []
    lists = []
    for q_head in range(KV_HEADS * group):
        rows = [probabilities(case, query, q_head) for query in range(n)]
        scores = [sum(column) for column in zip(*rows, strict=True)]
        allowed = scores[SINKS : candidates - recent]
        lists.append([number + SINKS for number in best(allowed, middle)])
    for rank in range(middle):
        for ranked in lists:
            if ranked[rank] not in chosen and len(chosen) < middle:
                chosen.append(ranked[rank])
    expected = [*range(SINKS), *sorted(chosen), *range(candidates - recent, candidates)]
    assert SELECTORS["lessismore"](case).tolist() == [expected]


@pytest.mark.parametrize("name", ["topk", "quest", "omnikv", "lessismore"])
def test_ties_go_to_the_lower_position(name: str) -> None:
    case = draw(32, 256, 100)
    case = case._replace(keys=torch.zeros_like(case.keys))
    # lessismore too: a quarter of 132 keys in all is less than first keys and own tile.
    assert SELECTORS[name](case)[0].tolist() == list(range(100))


def test_lessismore_keeps_a_quarter_for_the_latest_keys() -> None:
    """The own tile is a part of that quarter, as are the first keys."""
    case = draw(32, 2048, 768)._replace(keys=torch.zeros(2080, KV_HEADS, 16).double())
    found = SELECTORS["lessismore"](case)[0].tolist()
    latest = (768 + TILE) // 4 - SINKS - TILE
    assert found == [*range(768 - latest), *range(2048 - latest, 2048)]


def test_window_is_first_and_latest() -> None:
    found = SELECTORS["window"](draw(32, 256, 100))[0].tolist()
    assert found == [0, 1, 2, 3, *range(160, 256)]


def test_random_depends_on_layer_and_tile_alone() -> None:
    case = draw(32, 256, 100)
    found = SELECTORS["random"](case)
    assert torch.equal(SELECTORS["random"](case._replace(q=-case.q[5:])), found)
    assert not torch.equal(SELECTORS["random"](case._replace(layer=4)), found)
