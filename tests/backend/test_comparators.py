"""The methods that Kascade is compared with, through the backend: same budgets, same bits."""

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kascade_kernels.budget import Budget
from kascade_sglang.backend.selectors import SELECTORS, Case
from tests.support.harness import DTYPE, Harness, expected_output

COMPARED = [name for name in SELECTORS if name != "topk"]
METHODS = pytest.mark.parametrize("method", COMPARED)
TOLERANCE = 1e-5 if DTYPE is torch.float32 else 2e-3
LENGTHS = [1, 33, 129, 237]
EVERY_LAYER = (0, 1, 2, 3)


def build(method: str, lengths: list[int], **options: object) -> Harness:
    """A harness under the plan that the method's configuration brings."""
    anchors = EVERY_LAYER if method == "quest" else (0, 2)
    return Harness(lengths, selection=method, anchors=anchors, **options)


@METHODS
def test_mixed_batch_equals_float64_attention(method: str) -> None:
    harness = build(method, LENGTHS)
    harness.step([(request, 0, length) for request, length in enumerate(LENGTHS)])
    for layer in range(harness.layers):
        for request in range(len(LENGTHS)):
            expected = expected_output(harness, layer, request)
            out = harness.outputs[layer][request].double().cpu()
            torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)


@METHODS
def test_budgets_are_kascades(method: str) -> None:
    harness = build(method, [237])
    harness.prefill(0, 237)
    for layer in range(1, harness.layers):
        assert [tile for tile, _ in harness.selections[layer][0]] == list(range(8))
        for (tile, _), positions in harness.selections[layer][0].items():
            assert positions.shape == (2, harness.config.budget.selected(tile))
            assert (positions.diff(dim=1) > 0).all()
            assert ((positions >= 0) & (positions < 32 * tile)).all()


@METHODS
@pytest.mark.parametrize("chunk, page_size", [(32, 1), (96, 16), (64, 32)])
def test_chunks_and_pages_change_no_bit(method: str, chunk: int, page_size: int) -> None:
    whole, chunked = build(method, [237]), build(method, [237], page_size=page_size, slot_seed=5)
    whole.prefill(0, 237)
    chunked.prefill(0, chunk)
    for layer in range(whole.layers):
        ours, theirs = whole.selections[layer][0], chunked.selections[layer][0]
        assert ours and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        if layer > 0:
            assert torch.equal(whole.outputs[layer][0], chunked.outputs[layer][0])


@METHODS
def test_decode_equals_one_token_extend_and_float64(method: str) -> None:
    decode, extend = build(method, [140, 134]), build(method, [140, 134])
    for harness, mode in ((decode, ForwardMode.DECODE), (extend, ForwardMode.MIXED)):
        harness.step([(0, 0, 136), (1, 0, 130)])
        for offset in range(4):
            harness.step([(0, 136 + offset, 137 + offset), (1, 130 + offset, 131 + offset)], mode)
    for layer in range(1, 4):
        for request, (begin, end) in enumerate([(136, 140), (130, 134)]):
            ours = decode.outputs[layer][request][begin:end]
            assert torch.equal(ours, extend.outputs[layer][request][begin:end])
            expected = expected_output(decode, layer, request)[begin:end]
            torch.testing.assert_close(
                ours.double().cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE
            )


@pytest.mark.parametrize("method", ["omnikv", "lessismore"])
def test_one_list_serves_all_heads_and_the_layers_after_it(method: str) -> None:
    harness = build(method, [237])
    harness.prefill(0, 237)
    for layer, anchor in ((1, 0), (2, 2), (3, 2)):
        assert harness.selections[layer][0]
        for key, positions in harness.selections[layer][0].items():
            assert torch.equal(positions[0], positions[1])
            assert torch.equal(positions, harness.selections[anchor][0][key])


def test_quest_selects_anew_in_every_layer() -> None:
    harness = build("quest", [237])
    harness.prefill(0, 237)
    key = (6, 192)
    lists = [harness.selections[layer][0][key] for layer in range(4)]
    assert not any(torch.equal(lists[layer], lists[layer - 1]) for layer in (1, 2, 3))


@METHODS
@pytest.mark.parametrize("missing", [0, 1])
def test_a_budget_of_everything_leaves_nothing_to_choose(method: str, missing: int) -> None:
    q, keys = torch.randn(20, 8, 32), torch.randn(276, 2, 32)
    found = SELECTORS[method](Case(q, keys, 256 - missing, 1, 32**-0.5, pooled=False))
    for positions in found:
        assert len(positions) == 256 - missing
        assert positions.tolist() == sorted(set(positions.tolist()))
        assert missing or torch.equal(positions, torch.arange(256))


@METHODS
def test_a_budget_of_everything_is_dense(method: str) -> None:
    harness = build(method, [237], budget=Budget(1.0, 64))
    harness.prefill(0, 237)
    for layer in range(1, 4):
        found = harness.selections[layer][0]
        assert [len(positions[0]) for positions in found.values()] == list(range(0, 237, 32))
        q, k, v = (tensor.double().transpose(0, 1)[None] for tensor in harness.qkv[layer][0])
        dense = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        out = harness.outputs[layer][0].double()
        torch.testing.assert_close(out, dense, rtol=TOLERANCE, atol=TOLERANCE)
