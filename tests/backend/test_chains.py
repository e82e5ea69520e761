"""Chains of drafts: each token's bits are those of a decode step of that token alone."""

from functools import cache
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.asks import EVERYTHING, Ask
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.release import VERIFIED_WITH_SPECULATION
from kascade_sglang.host.steps import Batch
from tests.support.harness import DEVICE, Harness
from tests.support.interpreter import multiply_by_row
from tests.support.shapes import INTERPRETED

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" and not INTERPRETED, reason="chains are verified by kernels"
)

LENGTHS = [170, 70]
CHAIN = 3
STARTS = [(0, 161), (1, 62)]
"""Where the chains begin. The second passes the end of a tile, where the budget stops to cover all
keys."""


@pytest.fixture(autouse=True)
def products_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply as GPUs do: a row has the same bits at every place."""
    if INTERPRETED:
        multiply_by_row(monkeypatch)


def harness_of(chain: int, **options: object) -> Harness:
    of_model = {"layers": 3, "anchors": (0, 1), "budget": Budget(0.1, 64)}
    # Dense prefill is the dense backend's, which takes no time.
    of_server = {"exact": False, "batch_invariant": True, "phases": "decode"}
    return Harness(LENGTHS, chain=chain, **{**of_model, **of_server, **options})


def prefilled(chain: int, **options: object) -> Harness:
    harness = harness_of(chain, **options)
    harness.step([(request, 0, begin) for request, begin in STARTS])
    return harness


def alone(count: int, asks: dict[int, Ask] | None = None, **options: object) -> Harness:
    """Decode the same tokens one by one, each request by itself."""
    harness = prefilled(1, **options)
    harness.asks = asks or {}
    for request, begin in STARTS:
        for position in range(begin, begin + count):
            harness.step([(request, position, position + 1)])
    return harness


def assert_same(verified: Harness, decoded: Harness, count: int) -> None:
    for layer in range(verified.layers):
        for request, begin in STARTS:
            rows = slice(begin, begin + count)
            found, expected = (each.outputs[layer][request][rows] for each in (verified, decoded))
            assert torch.equal(found, expected), (layer, request)


@cache
def usual() -> Harness:
    """Decode more tokens than a chain has, with the usual options; once for all tests."""
    return alone(2 + CHAIN)


FP8 = {"kv_cache_dtype": "fp8_e4m3", "scales": (0.6, 1.5), "phases": "both"}


@pytest.mark.parametrize(
    "options",
    [{"heads": "pooled", "group": 8, "page_size": 32}, FP8],
    ids=str,
)
def test_a_chain_s_tokens_have_the_bits_of_single_steps(options: dict[str, object]) -> None:
    verified = prefilled(CHAIN, **options)
    verified.verify(STARTS)
    assert_same(verified, alone(CHAIN, **options), CHAIN)


def test_chains_have_the_same_bits_by_8_bit_scores() -> None:
    verified = prefilled(CHAIN)
    verified.verify(STARTS)
    assert_same(verified, usual(), CHAIN)


def test_drafts_that_were_rejected_leave_nothing_behind() -> None:
    """The next chain begins within the last one: its slots, and their copies, are written anew."""
    verified, other = prefilled(CHAIN), harness_of(CHAIN, data_seed=77)
    true, verified.qkv = verified.qkv, other.qkv
    verified.verify(STARTS)
    verified.qkv = true
    verified.verify(STARTS)
    verified.verify([(request, begin + 2) for request, begin in STARTS])
    assert_same(verified, usual(), 2 + CHAIN)


def test_chains_in_buffers_of_graphs() -> None:
    """Graphs' buffers are larger than a step, and keep what larger steps left in them."""
    verified = prefilled(CHAIN)
    verified.backend.init_cuda_graph_state(len(LENGTHS) + 2, (len(LENGTHS) + 2) * CHAIN)
    verified.verify(STARTS)
    verified.verify(STARTS[:1])
    verified.verify(STARTS[1:])
    path = verified.backend.paths.decode
    assert verified.backend.running.step.buffers is path._graph_buffers
    assert path._eager_buffers is None
    assert_same(verified, usual(), CHAIN)


def test_what_a_request_asks_for_holds_for_its_whole_chain() -> None:
    asks = {0: Ask(EVERYTHING, EVERYTHING), 1: Ask(Budget(0.1, 64), Budget(0.4, 96))}
    verified = prefilled(CHAIN, max_ratio=0.5)
    verified.asks = asks
    verified.verify(STARTS)
    assert_same(verified, alone(CHAIN, asks, max_ratio=0.5), CHAIN)


def test_a_batch_of_chains_knows_its_rows() -> None:
    ends = torch.tensor([10, 70])
    batch = Batch(True, ends, ends, ends, ends_cpu=ends.numpy(), chain=3)
    assert batch.row_ends.tolist() == [8, 9, 10, 68, 69, 70]
    assert [each.tolist() for each in batch.spans] == [[7, 67], [10, 70]]
    assert np.array_equal(batch.spans[1] - batch.spans[0], [3, 3])


def test_steps_of_another_length_are_refused() -> None:
    harness = prefilled(CHAIN)
    with pytest.raises(KascadeError, match="expected 3 tokens a request.*got 1"):
        harness.step([(0, 161, 162)])


@pytest.mark.skipif(version("sglang") not in VERIFIED_WITH_SPECULATION, reason="refused there")
def test_what_sglang_moves_of_a_chain_stays_where_it_is() -> None:
    """So 8-bit copies of accepted drafts' keys need not follow; n-grams are always "moved"."""
    from sglang.srt.speculative.spec_utils import move_accept_tokens_to_target_kvcache

    table = torch.randperm(100, device=DEVICE, dtype=torch.int32)[:60].view(3, 20)
    requests, lengths = torch.tensor([2, 0], device=DEVICE), torch.tensor([5, 9], device=DEVICE)
    written = torch.cat([table[2, 5 : 5 + CHAIN], table[0, 9 : 9 + CHAIN]]).to(torch.int64)
    batch = SimpleNamespace(
        seq_lens=lengths,
        req_pool_indices=requests,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        out_cache_loc=written,
    )
    moved = []
    pool = SimpleNamespace(move_kv_cache=lambda *slots: moved.append(slots))
    # The second request's last two drafts are rejected.
    accepted = torch.tensor([[0, 1, 2], [3, -1, -1]], device=DEVICE)
    move_accept_tokens_to_target_kvcache(
        batch,
        accepted,
        torch.tensor([2, 0], device=DEVICE),
        SimpleNamespace(get_kvcache=lambda: pool),
    )
    [(to, of)] = moved
    assert torch.equal(to, of)
    assert to[: CHAIN + 1].tolist() == written[: CHAIN + 1].tolist()
