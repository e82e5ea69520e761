"""Sinks that a model gives with its call reach every path, and the dense backend, once each."""

from types import SimpleNamespace

import pytest
import torch

from kascade_kernels.reference import select_topk, tile_scores
from kascade_sglang.errors import KascadeError
from kascade_sglang.plan.schema import LayerRole
from tests.support.harness import DTYPE, HEAD_DIM, Harness, expected_output
from tests.support.shapes import INTERPRETED

LENGTHS = [1, 40, 173]
TOLERANCE = 1e-5 if DTYPE is torch.float32 else 2e-3


def with_sinks(phases: str = "both") -> Harness:
    """A gpt-oss: windows in every second layer, and of the others the first attends densely."""
    layers = {"layers": 6, "anchors": (1, 3), "windowed": (0, 2, 4), "window": 40}
    harness = Harness(LENGTHS, **layers, phases=phases, sinks=True)
    harness.step([(2, 0, 128)])
    harness.step([(0, 0, 1), (1, 0, 39), (2, 128, 171)])
    harness.step([(1, 39, 40), (2, 171, 172)])
    harness.step([(2, 172, 173)])
    return harness


# In the interpreter each program of a kernel takes milliseconds.
@pytest.mark.parametrize("phases", ["both"] if INTERPRETED else ["both", "decode"])
def test_every_layer_attends_with_its_sinks(phases: str) -> None:
    """Prefill in chunks, a mixed batch, and decoding, of all roles."""
    harness = with_sinks(phases)
    roles = {harness.config.plan.role(layer) for layer in range(6)}
    assert roles == {LayerRole.WINDOW, LayerRole.DENSE, LayerRole.ANCHOR, LayerRole.REUSE}
    for layer in range(6) if phases == "both" else (0, 2, 4):
        for request in range(len(LENGTHS)):
            out = harness.outputs[layer][request].double().cpu()
            expected = expected_output(harness, layer, request)
            torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_anchors_select_by_what_is_left_of_the_mass() -> None:
    harness = with_sinks()
    q, k, _ = harness.kept(3, 2)
    sinks = harness.sinks[3].double().cpu()
    for (tile, first), found in harness.selections[3][2].items():
        # The last two queries are steps of decoding, a tile each.
        end = first + 1 if first >= 171 else min(32 * (tile + 1), 171)
        scores = tile_scores(q[first:end], k[:end], HEAD_DIM**-0.5, sinks)
        assert torch.equal(found, select_topk(scores, found.shape[1]))


def test_the_dense_backend_gets_them_as_they_came() -> None:
    harness, given = with_sinks(), []
    layer, batch = (
        harness.layer(0),
        SimpleNamespace(out_cache_loc=torch.zeros(1, dtype=torch.int64)),
    )
    q, k, v = (torch.zeros(1, heads, HEAD_DIM) for heads in (8, 2, 2))
    dense = SimpleNamespace(forward_decode=lambda *a, **more: given.append(more) or q)
    harness.backend.dense = dense
    for sinks in ({}, {"sinks": harness.sinks[0]}):
        harness.backend.forward_decode(q.flatten(1), k, v, layer, batch, **sinks)
    assert given == [{}, {"sinks": harness.sinks[0]}]


def test_other_arguments_are_refused() -> None:
    harness, q = with_sinks(), torch.zeros(1, 8 * HEAD_DIM)
    with pytest.raises(KascadeError, match="layer 3: expected q, k, v and sinks, got .'q_rope'"):
        harness.backend.forward_decode(q, q, q, harness.layer(3), None, q_rope=q)
