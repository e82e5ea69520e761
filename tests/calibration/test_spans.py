"""Many spans at once, against the reference's attention of one tile."""

import itertools

import pytest
import torch

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.reference import tile_attention
from kascade_sglang.calibration.spans import Span, alike, attend_to_lists, key_lists, spans_of

BUDGET = Budget(0.1, 64)
LENGTH = 12 * TILE + 7
ROWS = [70, 71, 95, 96, 300, LENGTH - 1]


def test_tiles_share_a_selection_but_for_rows_that_answer() -> None:
    """The first two tiles read every key."""
    found = spans_of(4 * TILE + 3, [70, 71, 95, 96], BUDGET)
    expected = [(64, 70), (70, 71), (71, 72), (72, 95), (95, 96), (96, 97), (97, 128), (128, 131)]
    assert found == expected


@pytest.mark.parametrize("most", [1, 9000, 1 << 18])
def test_alike_spans_are_neighbours_of_one_size_and_few(most: int) -> None:
    spans = spans_of(LENGTH, ROWS, BUDGET)
    groups = list(alike(spans, BUDGET, most))
    assert list(itertools.chain(*groups)) == spans
    for group in groups:
        keys = max(BUDGET.selected(tile_of(span.begin)) + TILE for span in group)
        (size,) = {span.end - span.begin for span in group}
        assert len(group) == 1 or len(group) * size * keys <= most


@pytest.mark.parametrize("group", [1, 4])
def test_equals_the_reference_in_float64(group: int) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(LENGTH, 2 * group, 8, generator=draw).double()
    k, v = (torch.randn(LENGTH, 2, 8, generator=draw).double() for _ in range(2))
    head_map = torch.tensor([1, 1])
    for spans in alike(spans_of(LENGTH, ROWS, BUDGET), BUDGET, 1 << 18):
        selected = [keys_for(span, draw) for span in spans]
        lists = key_lists(spans, selected).of_heads(head_map, q.device)
        found = attend_to_lists(q, k, v, lists, 0.5)
        for span, keys, one in zip(spans, selected, found, strict=True):
            own = torch.arange(TILE * tile_of(span.begin), span.end)
            expected = tile_attention(q[slice(*span)], k, v, keys[head_map], own, 0.5)
            torch.testing.assert_close(one, expected)


def keys_for(span: Span, draw: torch.Generator) -> torch.Tensor:
    """Random keys before the span's tile, as many as its budget says, for two heads."""
    tile = tile_of(span.begin)
    order = torch.rand(2, TILE * tile, generator=draw).argsort(-1)
    return order[:, : BUDGET.selected(tile)]


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_capped_logits_in_float64(softcap: float) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(70, h, 8, generator=draw).double() for h in (4, 2, 2))
    selected = torch.tensor([[3, 40, 9], [0, 63, 5]])
    lists = key_lists([Span(67, 70)], [selected])
    found = attend_to_lists(q, k, v, lists, 0.5, softcap)[0]
    for query, head in itertools.product(range(3), range(4)):
        keys = torch.cat([selected[head // 2], torch.arange(64, 68 + query)])
        logits = softcap * torch.tanh(k[keys, head // 2] @ q[67 + query, head] * 0.5 / softcap)
        expected = logits.softmax(0) @ v[keys, head // 2]
        torch.testing.assert_close(found[query, head], expected)
