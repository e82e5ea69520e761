"""Makers and candidate pools in calibration, against pools made by hand."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from kascade_kernels.budget import TILE, Budget, PoolRule, tile_of
from kascade_sglang.calibration import pools
from kascade_sglang.calibration.answers import Selecting, SparseAnswers, answers_of
from kascade_sglang.calibration.hf_attention import LayerCall
from kascade_sglang.calibration.pools import Pools, choose_makers, makers_of, most_pooled
from kascade_sglang.calibration.prompts import Prompt
from tests.support.families import build

BUDGET, RULE = Budget(0.1, 64), PoolRule(0.4)
LAYERS = (0, 1, 2, 3)
MAPS = torch.tensor([1, 0]).expand(4, 4, 2).clone()
"""Heads swapped between layers, so that a forgotten map shows."""


def drawn(seed: int, layer: int, rows: list[int], length: int, group: int) -> LayerCall:
    """Queries of rows and keys of a layer with two KV heads, in float64."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(len(rows), 2 * group, 16, generator=draw, dtype=torch.float64)
    k = torch.randn(length, 2, 16, generator=draw, dtype=torch.float64)
    return LayerCall(layer, q, k, k, 0.5)


def best(call: LayerCall, row: int, place: int, head: int, inside: list[int], count: int) -> set:
    """The ``count`` keys of ``inside`` with most attention, of these and the row's own tile."""
    own = range(TILE * tile_of(row), row + 1)
    group = call.q.shape[1] // 2
    queries = call.q[place, head * group : (head + 1) * group]
    keys = call.k[[*inside, *own], head]
    mass = (queries @ keys.T * call.scale).softmax(-1).sum(0)[: len(inside)]
    return {inside[at] for at in mass.topk(count).indices.tolist()}


@pytest.mark.parametrize("group", [1, 3])
def test_pooled_anchors_select_from_the_mapped_heads_pool(group: int) -> None:
    rows, length = [200, 391, 415], 416
    how = Selecting(LAYERS, MAPS, BUDGET)
    select = Pools(how, (1,), RULE)
    calls = [drawn(layer, layer, rows, length, group) for layer in (0, 1, 2)]
    lists = [select(call, torch.tensor(rows), BUDGET, False) for call in calls]
    for place, row in enumerate(rows):
        every = list(range(TILE * tile_of(row)))
        count, pooled = BUDGET.selected(tile_of(row)), RULE.pooled(tile_of(row), BUDGET)
        for head in (0, 1):
            found = [set(one.keys[place, head, :count].tolist()) for one in lists]
            pool = sorted(best(calls[1], row, place, 1 - head, every, pooled))
            assert found[0] == best(calls[0], row, place, head, every, count)
            assert found[1] == best(calls[1], row, place, head, every, count)
            assert found[2] == best(calls[2], row, place, head, pool, count)
            assert found[2] != best(calls[2], row, place, head, every, count)


def test_makers_are_all_that_score_every_key_after_the_first() -> None:
    anchors = (0, 3, 9, 13, 16)
    assert makers_of(anchors, set()) == ()
    assert makers_of(anchors, {16}) == (13,)
    assert makers_of(anchors, {3, 16}) == (0, 9, 13)
    assert makers_of(anchors, {9, 13}) == (3, 16)


class Priced:
    """A prompt whose loss is the sum of what its pooled anchors cost."""

    depth, costs = 8, {1: 0.05, 2: 0.01, 4: 0.03, 7: 0.5}
    loads = 0

    def loaded(self) -> AbstractContextManager[None]:
        self.loads += 1
        return nullcontext()

    def keep(self, anchors: tuple[int, ...]) -> None:
        self.anchors = anchors

    def loss_where(self, select: Pools) -> float:
        makers = select._makers
        pooled = [one for one in self.anchors if makers and one > makers[0] and one not in makers]
        return 1.0 + sum(self.costs[one] for one in pooled)


def test_the_anchor_that_is_missed_least_is_pooled_first() -> None:
    trials: list[float] = []
    prompts = [Priced(), Priced()]
    found = choose_makers(prompts, None, (0, 1, 2, 4, 7), RULE, trials.append, row_work=3)
    assert [one.makers for one in found] == [(), (1, 4, 7), (1, 7), (0, 7), (0,)]
    assert most_pooled(found).makers == (0, 7)
    assert len(trials) == len(prompts) * (4 + 3 + 2 + 1)
    assert sum(trials) == pools.work_of(2, 5, 8, 3) == pools.work_of(2, (0, 1, 2, 4, 7), 8, 3)
    assert [prompt.loads for prompt in prompts] == [5, 5], "once a round"


def test_losses_are_those_of_the_pools() -> None:
    model = build("llama3").eval()
    draw = torch.Generator().manual_seed(3)
    length = 13 * TILE + 5
    prompt = Prompt(torch.randint(4, 64, (length,), generator=draw).tolist())
    how = Selecting(LAYERS, MAPS, BUDGET)
    sparse = SparseAnswers(answers_of(model, prompt, list(range(length - 20, length))), how)
    anchors = (0, 1, 3)
    with sparse.loaded():
        whole = sparse.keep(anchors)
    losses = [
        pools.losses_of([sparse], how, anchors, [makers], PoolRule(share))[0]
        for makers, share in (((), 0.5), ((1,), 0.98), ((1,), 0.3))
    ]
    assert losses[:2] == pytest.approx([whole, whole]) and losses[2] != pytest.approx(whole)
