"""Handing an anchor's slots to the layers that reuse it, on one rank or several."""

import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError
from tests.support.harness import make_plan


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_head_maps_stay_within_a_rank(ranks: int) -> None:
    plan = make_plan(layers=4, kv_heads=4, group=2, anchors=(0, 2))
    count = 4 // ranks
    for rank in range(ranks):
        heads = range(rank * count, (rank + 1) * count)
        store = IndexStore(KascadeConfig(plan, Budget(), "per_head"), heads, "cpu")
        slots = torch.arange(100 * rank, 100 * rank + 3 * count).view(count, 3)
        store.put(0, [slots])
        (kept,), head_map = store.get(1)
        reused = kept[head_map]
        for local, head in enumerate(heads):
            similar = plan.similarity[1][head][heads.start : heads.stop]
            best = max(range(count), key=lambda anchor, row=similar: row[anchor])
            assert torch.equal(reused[local], slots[best])


def test_an_anchor_gets_its_own_slots_back() -> None:
    plan = make_plan(layers=4, kv_heads=4, group=2, anchors=(0, 2))
    store = IndexStore(KascadeConfig(plan, Budget(), "per_head"), range(4), "cpu")
    slots = torch.arange(12).view(4, 3)
    store.put(2, [slots])
    (kept,), head_map = store.get(2)
    assert kept is slots and head_map.tolist() == [0, 1, 2, 3]


def test_a_layer_never_gets_the_keys_of_another_anchor_or_step() -> None:
    plan = make_plan(layers=4, kv_heads=4, group=2, anchors=(0, 2))
    store = IndexStore(KascadeConfig(plan, Budget(), "per_head"), range(4), "cpu")
    for layer in (0, 3):
        with pytest.raises(KascadeError, match=f"layer {layer} ran before its anchor"):
            store.get(layer)
        store.put(0, [])
    store.clear()
    with pytest.raises(KascadeError, match="layer 1 ran before its anchor, layer 0, in this step"):
        store.get(1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pool_goes_to_the_anchors_after_its_maker(ranks: int) -> None:
    plan = make_plan(layers=6, kv_heads=4, group=2, anchors=(0, 1, 3, 4), makers=(1, 3))
    count = 4 // ranks
    for rank in range(ranks):
        heads = range(rank * count, (rank + 1) * count)
        store = IndexStore(KascadeConfig(plan, Budget(), "per_head"), heads, "cpu")
        # The anchor after layer 1 is a maker itself, so nobody scores layer 1's pool.
        assert [layer for layer in range(6) if store.makes_pool(layer)] == [3]
        assert [store.pool_of(layer) for layer in range(4)] == [None] * 4
        with pytest.raises(KascadeError, match="layer 4 ran before its maker, layer 3, in this"):
            store.pool_of(4)
        store.put_pool(3, pools := ())
        found, head_map = store.pool_of(4)
        assert found is pools and tuple(head_map.tolist()) == plan.local_head_map(4, heads)
