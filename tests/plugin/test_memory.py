"""What the KV pool leaves for the kernels: copies of keys, scores, lists, slots and parts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_patches import pool_cell_size, pool_sizes
from kascade_sglang.backend import memory
from kascade_sglang.backend.memory import ReservedMemory, reserved_memory
from kascade_sglang.checks import check
from kascade_sglang.config import MB
from kascade_sglang.host import server
from kascade_sglang.host.server import largest_decodes, server_facts
from kascade_sglang.plan.schema import Plan
from tests.support.models import GEMMA_3, POOL_PLAN, WINDOWED_PLAN, make_plan, parse

LISTS, ROOM = 4, 409 - 32 + 32
"""KV heads; a tenth of the 4096 positions, in which the own tile is counted, and a tile."""
SLOTS = 4 * 8 * 4096
"""Of eight captured requests."""
PARTS = 4 * 8 * 8 * 64 * (16 + 1)
"""Eight requests of eight query heads in 64 parts, each a row of a head and its log-sum-exp."""


@pytest.fixture
def reserved(make_model: Callable[..., Path]) -> Callable[..., ReservedMemory]:
    """Memory of a server whose kernels run, as a worker counts it."""

    def count(
        exact: bool = False,
        heads: str = "per_head",
        prefill: Budget | None = None,
        max_ratio: float | None = None,
        kv_cache_dtype: str = "auto",
        plan: Plan | None = None,
        **changes: object,
    ) -> ReservedMemory:
        facts = server_facts(parse(make_model(), "--chunked-prefill-size", "256"))
        budgets = {"budget": Budget(0.1, 128), "prefill": prefill, "max_ratio": max_ratio}
        chosen = {"exact": exact, "heads": heads, "kv_cache_dtype": kv_cache_dtype}
        config = replace(check(facts), **chosen, **budgets)
        config = replace(config, plan=plan or config.plan)
        facts = replace(facts, gpu=True, captured_decode=8, eager_decode=0)
        return reserved_memory(replace(facts, **changes), config)

    return count


SMALL = 2 * 8 * 8 + 4 * (8 + 8 * 8 + 2 * 8 + 2 * 8 + 8 + 8 * 8) + 8 * 8 * LISTS
"""At most: requests, counts, spans, budgets and shared prefixes of eight requests."""


def test_scores_and_lists_are_counted(reserved: Callable[..., ReservedMemory]) -> None:
    decoding, prefill = 8 * ROOM, 256 // 32 * (ROOM - 32)
    others = 768 * MB + SLOTS + PARTS
    per_head, pooled = reserved().scratch - others, reserved(heads="pooled").scratch - others
    for found, lists in ((per_head, LISTS), (pooled, 1)):
        assert 0 < found - 4 * lists * (decoding + prefill) <= SMALL


def test_longer_lists_in_prefill_are_counted(reserved: Callable[..., ReservedMemory]) -> None:
    more = reserved(prefill=Budget(0.1, 1024)).scratch - reserved().scratch
    assert more == 4 * LISTS * 256 // 32 * (1024 - 409)


def test_longer_lists_that_a_request_may_ask_for_are_counted(
    reserved: Callable[..., ReservedMemory],
) -> None:
    more = reserved(max_ratio=0.2).scratch - reserved().scratch
    assert more == 4 * LISTS * (8 + 256 // 32) * (819 - 409)


def test_candidate_pools_are_counted(reserved: Callable[..., ReservedMemory]) -> None:
    """A quarter of the 4096 positions, and a tile, for each row and KV head."""
    without, rows = reserved().scratch, 8 * LISTS
    more = reserved(plan=make_plan(**POOL_PLAN)).scratch - without
    assert more == rows * (4 * (1024 + 32) + 8 + 4) + 8 * (4 + 4)


def test_chains_have_a_row_and_lists_for_each_draft(
    reserved: Callable[..., ReservedMemory],
) -> None:
    """And share one copy of their request's slots."""
    others = 768 * MB + SLOTS + 4 * LISTS * 256 // 32 * (ROOM - 32)
    rows = 4 * LISTS * 8 * ROOM + PARTS
    for chain in (1, 5):
        assert 0 <= reserved(chain=chain).scratch - others - chain * rows <= chain * SMALL


def test_copies_are_counted_by_the_token(reserved: Callable[..., ReservedMemory]) -> None:
    anchors, kv_heads, head_dim = 2, 4, 16
    assert reserved().per_token == anchors * kv_heads * (head_dim + 4)
    assert reserved(exact=True).per_token == 0
    assert reserved(kv_cache_dtype="fp8_e4m3").per_token == 0
    assert reserved(stages=4).per_token == kv_heads * (head_dim + 4)


def test_layers_that_never_select_have_no_copies(make_model: Callable[..., Path]) -> None:
    """Of a Gemma 3 with two windowed layers of four, and one anchor."""
    facts = server_facts(parse(make_model(make_plan(**WINDOWED_PLAN), **GEMMA_3)))
    found = reserved_memory(replace(facts, gpu=True), check(facts))
    assert found.per_token == 1 * 4 * (16 + 4)


def test_ranks_hold_their_share(reserved: Callable[..., ReservedMemory]) -> None:
    assert reserved(tensor_ranks=2).per_token * 2 == reserved().per_token


def test_nothing_is_reserved_where_the_kernels_do_not_run(
    reserved: Callable[..., ReservedMemory],
) -> None:
    assert reserved(gpu=False) == ReservedMemory(0, 0)


def test_unchunked_prefill_counts_what_a_step_may_hold(make_model: Callable[..., Path]) -> None:
    """A prompt as long as the context is taken whole, if it is the step's only one."""
    chunks = ("--chunked-prefill-size", "-1", "--max-prefill-tokens")
    for most, expected in (("8192", 8192), ("128", 4096)):
        facts = server_facts(parse(make_model(), *chunks, most))
        assert facts.largest_prefill == expected
    facts = server_facts(parse(make_model(), "--chunked-prefill-size", "256"))
    assert facts.largest_prefill == 256


@pytest.mark.parametrize(
    ("backend", "most", "sizes", "running", "expected"),
    [
        ("full", 8, [1, 2, 16], None, (16, 0)),
        ("full", 8, None, 12, (8, 12)),
        ("full", 8, None, 8, (8, 0)),
        ("full", 8, [1, 2, 16], 3, (3, 0)),
        ("disabled", 8, [1, 2], None, (0, 0)),
        ("disabled", 8, [1, 2], 5, (0, 5)),
    ],
)
def test_decode_batches_are_captured_or_as_many_as_may_run(
    backend: str, most: int, sizes: list[int] | None, running: int | None, expected: tuple[int, int]
) -> None:
    decode = SimpleNamespace(backend=backend, max_bs=most, bs=sizes)
    config = SimpleNamespace(decode=decode)
    args = SimpleNamespace(cuda_graph_config=config, max_running_requests=running)
    assert largest_decodes(args) == expected


def test_nothing_is_reserved_for_decoding_that_is_not_known(
    reserved: Callable[..., ReservedMemory],
) -> None:
    found = reserved(captured_decode=0).scratch
    assert found == 768 * MB + 4 * 256 // 32 * LISTS * (ROOM - 32)


def test_eager_steps_have_buffers_of_their_own(reserved: Callable[..., ReservedMemory]) -> None:
    none = reserved(captured_decode=0).scratch
    one = reserved(captured_decode=0, eager_decode=8).scratch - none
    assert one == reserved().scratch - none > 0
    assert reserved(eager_decode=8).scratch - none == 2 * one


def test_the_pool_leaves_what_is_reserved(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "reserved_memory", lambda facts, config: ReservedMemory(10, 1000))
    kvc = SimpleNamespace(server_args=parse(make_model()), kv_cache_dtype=torch.float32)
    pool, taken = SimpleNamespace(), []

    def sizes(configurator: object, available: int, page_size: int) -> None:
        taken.append((configurator is pool, available, page_size))

    assert pool_cell_size.hook(64, pool, kvc, 4) == 74
    for available in (5000, 500):
        pool_sizes.hook(sizes, pool, available, 16)
    monkeypatch.setattr(server, "phases_on_kascade", lambda args: frozenset())
    assert pool_cell_size.hook(64, pool, kvc, 4) == 64, "another backend's server"
    pool_sizes.hook(sizes, pool, 5000, 16)
    assert taken == [(True, 4000, 16), (True, 0, 16), (True, 5000, 16)]
