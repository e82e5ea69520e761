"""The backend against float64 attention, and against itself under other schedules."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from harness import Harness, expected_output
from kascade_kernels.budget import Budget
from kascade_kernels.reference import anchor_scores
from kascade_sglang.errors import KascadeError

LENGTHS = [1, 31, 32, 33, 127, 129, 301]


def assert_same(left: Harness, right: Harness, request: int, begin: int = 0) -> None:
    """Selections and sparse outputs from position ``begin`` on are equal to the last bit."""
    for layer in range(left.layers):
        theirs = left.selections[layer][request]
        ours = right.selections[layer][request]
        shared = [key for key in ours if key in theirs and key[1] >= begin]
        assert shared
        for key in shared:
            assert torch.equal(ours[key], theirs[key])
        if layer > 0:
            out = [h.outputs[layer][request][begin:] for h in (left, right)]
            assert torch.equal(*out)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("heads", ["per_head", "pooled"])
def test_mixed_batch_equals_float64_attention(group: int, heads: str) -> None:
    harness = Harness(LENGTHS, group=group, heads=heads)
    harness.step([(request, 0, length) for request, length in enumerate(LENGTHS)])
    for layer in range(harness.layers):
        for request in range(len(LENGTHS)):
            expected = expected_output(harness, layer, request)
            out = harness.outputs[layer][request].double()
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    harness = Harness([301], dtype=dtype)
    harness.prefill(0, 301)
    for layer in (1, 2, 3):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in harness.qkv[layer][0])
        expected = expected_output(harness, layer, 0)
        eager = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        exact = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
        )
        eager_error = (eager.double() - exact).norm() / exact.norm()
        error = (harness.outputs[layer][0].double() - expected).norm() / expected.norm()
        assert error <= eager_error


def test_anchor_selects_the_largest_scores() -> None:
    harness = Harness([301])
    harness.prefill(0, 301)
    q, k, _ = (tensor.double() for tensor in harness.qkv[2][0])
    for (tile, first), positions in harness.selections[2][0].items():
        end = min(32 * (tile + 1), 301)
        scores = anchor_scores(q[first:end], k[:end], 0.25)
        budget = harness.config.budget.selected(tile)
        assert positions.shape == (2, budget)
        kept = scores.gather(1, positions).sum(1)
        best = scores.topk(budget, dim=1).values.sum(1)
        torch.testing.assert_close(kept, best, rtol=1e-6, atol=1e-9)


def test_reuse_layers_follow_the_head_map() -> None:
    harness = Harness([301])
    harness.prefill(0, 301)
    for layer, anchor in ((1, 0), (3, 2)):
        head_map = list(harness.config.plan.head_map[layer])
        for key, positions in harness.selections[layer][0].items():
            assert torch.equal(positions, harness.selections[anchor][0][key][head_map])


@pytest.mark.parametrize("chunk", [32, 64, 160])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
def test_chunks_change_no_bit(chunk: int, page_size: int) -> None:
    whole = Harness([301], page_size=page_size)
    whole.prefill(0, 301)
    chunked = Harness([301], page_size=page_size, slot_seed=5)
    chunked.prefill(0, chunk)
    assert_same(whole, chunked, 0)


@pytest.mark.parametrize("prefix", [32, 128, 288])
def test_prefix_hit_changes_no_bit(prefix: int) -> None:
    cold = Harness([301], page_size=32)
    cold.prefill(0, 301)
    warm = Harness([301], page_size=32)
    for layer in range(warm.layers):
        slots = warm.req_to_token[1, :prefix].to(torch.int64)
        warm.pool.keys[layer][slots] = warm.qkv[layer][0][1][:prefix]
        warm.pool.values[layer][slots] = warm.qkv[layer][0][2][:prefix]
    warm.prefill(0, 301, begin=prefix)
    assert_same(cold, warm, 0, begin=prefix)


def test_batch_mates_change_no_bit() -> None:
    alone = Harness([301])
    alone.prefill(0, 301)
    together = Harness([301, 77, 200])
    together.step([(2, 0, 200), (0, 0, 301), (1, 0, 77)])
    assert_same(alone, together, 0)


def test_decode_equals_one_token_extend_and_float64() -> None:
    decode, extend = Harness([140, 70]), Harness([140, 70])
    for harness, mode in ((decode, ForwardMode.DECODE), (extend, ForwardMode.MIXED)):
        harness.step([(0, 0, 100), (1, 0, 65)])
        for offset in range(5):
            harness.step([(0, 100 + offset, 101 + offset), (1, 65 + offset, 66 + offset)], mode)
    for layer in range(1, 4):
        for request, (begin, end) in enumerate([(100, 105), (65, 70)]):
            ours = decode.outputs[layer][request][begin:end]
            assert torch.equal(ours, extend.outputs[layer][request][begin:end])
            expected = expected_output(decode, layer, request)[begin:end]
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_budget_of_everything_is_dense() -> None:
    harness = Harness([301], budget=Budget(1.0, 64))
    harness.prefill(0, 301)
    for layer in range(harness.layers):
        q, k, v = (tensor.double().transpose(0, 1)[None] for tensor in harness.qkv[layer][0])
        dense = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(harness.outputs[layer][0].double(), dense, rtol=1e-5, atol=1e-5)


def test_comparisons_keep_the_budget() -> None:
    exact = Harness([301])
    exact.prefill(0, 301)
    for method in ("window", "random"):
        other = Harness([301], selection=method)
        other.prefill(0, 301)
        for key, positions in other.selections[2][0].items():
            assert positions.shape == exact.selections[2][0][key].shape
            assert (positions.diff(dim=1) > 0).all()
            assert ((positions >= 0) & (positions < 32 * key[0])).all()
        if method == "window":
            last = other.selections[2][0][9, 288][0].tolist()
            assert last == [0, 1, 2, 3, *range(288 - 28, 288)]


def test_idle_batch_computes_nothing() -> None:
    harness = Harness([40])
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE, out_cache_loc=None)
    harness.backend.init_forward_metadata(idle)
    assert harness.backend.path.step.rows == ()


def test_reuse_before_its_anchor_is_refused() -> None:
    harness = Harness([40])
    with pytest.raises(KascadeError, match="before its anchor, layer 2"):
        harness.backend.paths.store.get(3)


def test_graph_capture_is_refused() -> None:
    with pytest.raises(KascadeError, match="disable-cuda-graph"):
        Harness([40]).backend.init_cuda_graph_state(1, 1)
