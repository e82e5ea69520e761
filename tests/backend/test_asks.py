"""Requests with budgets of their own, beside others: float64 attention, and no bit by company."""

from functools import cache

import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.asks import EVERYTHING, Ask
from kascade_sglang.backend.decode import DecodeBuffers
from tests.support.harness import DEVICE, DTYPE, Harness, expected_output
from tests.support.shapes import INTERPRETED

KERNELS = DEVICE == "cuda" or INTERPRETED
TOLERANCE = 1e-5 if DTYPE is torch.float32 else 2e-3
LENGTHS = [237, 200, 237, 170]
"""The longest must leave room on lists for what is asked: nobody refuses it here."""
DENSE = Ask(EVERYTHING, EVERYTHING)
ASKS = {
    1: Ask(Budget(0.3, 96), Budget(0.25, 128)),
    2: DENSE,
    3: Ask(EVERYTHING, Budget(0.1, 96)),
}
NEW = 2
"""Tokens that are decoded."""


def run(
    lengths: list[int], asks: dict[int, Ask], of: tuple[int, ...] | None = None, **options: object
) -> Harness:
    """Prefill in two chunks and decode, all requests together or some of them."""
    harness = Harness(lengths, max_ratio=0.5, exact=False, batch_invariant=True, **options)
    harness.asks = asks
    mine = [(request, lengths[request]) for request in of or range(len(lengths))]
    harness.step([(request, 0, 128) for request, _ in mine])
    harness.step([(request, 128, length - NEW) for request, length in mine])
    for new in range(NEW, 0, -1):
        harness.step([(request, length - new, length - new + 1) for request, length in mine])
    return harness


@cache
def all_together(heads: str) -> Harness:
    """Not a fixture of the module: those run without what tests patch, such as how rows split."""
    return run(LENGTHS, ASKS, heads=heads)


@pytest.fixture(params=["per_head", "pooled"])
def together(request: pytest.FixtureRequest) -> Harness:
    return all_together(request.param)


def test_every_request_attends_by_its_own_budget(together: Harness) -> None:
    for request, length in enumerate(LENGTHS):
        ask = ASKS.get(request, Ask(Budget(0.1, 64), Budget(0.1, 64)))
        for (tile, first), positions in together.selections[2][request].items():
            budget = ask.decode if first >= length - NEW else ask.prefill
            assert positions.shape[1] == budget.selected(tile)
        for layer in range(1, together.layers):
            expected = expected_output(together, layer, request)
            out = together.outputs[layer][request].double().cpu()
            torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_dense_request_s_attention_is_dense(together: Harness) -> None:
    for layer in range(together.layers):
        q, k, v = (tensor.double().transpose(0, 1)[None] for tensor in together.qkv[layer][2])
        dense = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        out = together.outputs[layer][2].double()
        torch.testing.assert_close(out, dense, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("request_", range(len(LENGTHS)))
def test_company_changes_no_bit(together: Harness, request_: int) -> None:
    alone = run(LENGTHS, ASKS, of=(request_,), heads=together.config.heads)
    for layer in range(1, together.layers):
        left, right = (each.outputs[layer][request_] for each in (alone, together))
        assert torch.equal(left, right)


def test_who_asks_for_nothing_gets_the_server_s_bits(together: Harness) -> None:
    usual = run(LENGTHS, {}, of=(0, 2), heads=together.config.heads)
    for layer in range(1, together.layers):
        assert torch.equal(usual.outputs[layer][0], together.outputs[layer][0])
        assert not torch.equal(usual.outputs[layer][2], together.outputs[layer][2])


def test_a_row_has_the_server_s_budget_again_after_one_that_asked() -> None:
    usual, after = (
        Harness([161, 161], max_ratio=0.5, batch_invariant=True, data_seed=3) for _ in range(2)
    )
    for harness in (usual, after):
        harness.step([(0, 0, 160), (1, 0, 160)])
    after.asks = {1: DENSE}
    after.step([(1, 160, 161)])
    for harness in (usual, after):
        harness.step([(0, 160, 161)])
    for layer in range(1, usual.layers):
        assert torch.equal(usual.outputs[layer][0][160], after.outputs[layer][0][160])


@pytest.mark.skipif(not KERNELS, reason="the reference has no buffers")
def test_a_list_of_every_key_takes_no_memory(together: Harness) -> None:
    """It is the row's copy of the slot table; a longer budget alone has room reserved for it."""
    step = together.backend.running.step
    lists, table = step.lists, step.buffers.table
    assert lists.offsets[2].unique().tolist() == [2 * table.shape[1]]
    assert (lists.offsets[[0, 1, 3]] >= table.numel()).all()
    sizes = together.backend.paths.sizes
    plain = Harness(LENGTHS, heads=together.config.heads).backend.paths.sizes
    assert sizes.longest_list > plain.longest_list
    fewer = DecodeBuffers(4, plain, together.config, "meta").nbytes
    assert fewer < DecodeBuffers(4, sizes, together.config, "meta").nbytes
