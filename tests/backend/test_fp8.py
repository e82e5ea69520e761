"""A KV pool in fp8: the backend against float64 attention to what the pool keeps."""

import pytest
import torch

from kascade_kernels.reference import tile_scores
from kascade_sglang.host.dense import FP8_TYPES
from tests.backend.test_backend import KERNELS, LONG
from tests.support.harness import HEAD_DIM, Harness, expected_output

SCALES = (0.6, 1.5)
TOLERANCE = 2e-3 if KERNELS else 1e-5
"""Kernels multiply fp8 in half precision, also where queries are float32."""
types = pytest.mark.parametrize("name", FP8_TYPES)


def decoded(name: str, **options: object) -> Harness:
    """A prompt, in chunks, and two new tokens."""
    harness = Harness([LONG], kv_cache_dtype=name, **options)
    for start in range(0, LONG - 2, 96):
        harness.step([(0, start, min(start + 96, LONG - 2))])
    for position in (LONG - 2, LONG - 1):
        harness.step([(0, position, position + 1)])
    return harness


@types
@pytest.mark.parametrize("scales", [None, SCALES], ids=["plain", "scaled"])
def test_equals_float64_attention_to_what_is_stored(
    name: str, scales: tuple[float, float] | None
) -> None:
    harness = decoded(name, exact=False, scales=scales)
    for layer in range(harness.layers):
        found = harness.outputs[layer][0].double().cpu()
        wanted = expected_output(harness, layer, 0)
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@types
def test_selections_are_the_largest_scores_of_the_stored_keys(name: str) -> None:
    harness = decoded(name, scales=SCALES)
    q, k, _ = harness.kept(2, 0)
    rtol = 1e-3 if KERNELS else 1e-6
    for (tile, first), positions in harness.selections[2][0].items():
        end = first + 1 if first >= LONG - 2 else min(32 * (tile + 1), LONG - 2)
        scores = tile_scores(q[first:end], k[:end], HEAD_DIM**-0.5)
        kept, best = scores.gather(1, positions), scores.topk(positions.shape[1], dim=1).values
        torch.testing.assert_close(kept.sum(1), best.sum(1), rtol=rtol, atol=1e-9)


def test_no_keys_are_copied() -> None:
    harness = Harness([40], kv_cache_dtype="fp8_e4m3", exact=False)
    kv = harness.backend.paths.kv
    assert kv.scoring_keys(0) is kv.of(0)[0]
    assert kv._copies == {}
