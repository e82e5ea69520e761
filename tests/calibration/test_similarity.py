"""Similarity on cases small enough to work out by hand."""

import numpy as np
import pytest
import torch

from kascade_sglang.calibration.similarity import (
    anchor_gain,
    layer_similarity,
    recovered_mass,
    tile_similarity,
)


def test_recovered_mass_by_hand() -> None:
    scores = torch.tensor([[5.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 5.0]])
    own = torch.tensor([1.0, 2.0])
    sets = torch.tensor([[0, 1], [2, 3], [0, 3]])
    expected = torch.tensor([[9.0, 2.0, 6.0], [3.0, 10.0, 7.0]])
    assert torch.equal(recovered_mass(scores, own, sets), expected)


def test_two_layers_two_heads_by_hand() -> None:
    scores = torch.tensor(
        [
            [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]],  # layer 0: Top-2 {0, 1} and {2, 3}
            [[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 1.0, 3.0]],  # layer 1: Top-2 {2, 3} and {0, 3}
        ]
    )
    own = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    similarity = tile_similarity(scores, own, count=2)
    # Layer 1 head 0 (own Top-2 mass 7 + 3) with layer 0's sets: 3 + 3 and 7 + 3.
    # Layer 1 head 1 (own Top-2 mass 7 + 1) with layer 0's sets: 5 + 1 and 4 + 1.
    expected = torch.tensor([[6 / 10, 1.0], [6 / 8, 5 / 8]])
    assert torch.allclose(similarity[0, 1], expected)
    assert layer_similarity(similarity.numpy())[0, 1] == pytest.approx((1.0 + 6 / 8) / 2)


@pytest.mark.parametrize("layers, heads, candidates, count", [(3, 2, 50, 7), (2, 8, 200, 64)])
def test_bounds_and_identity(layers: int, heads: int, candidates: int, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(layers, heads, candidates, generator=generator) ** 8
    similarity = tile_similarity(scores, torch.zeros(layers, heads), count)
    assert similarity.shape == (layers, layers, heads, heads)
    assert similarity.min() >= 0 and similarity.max() <= 1
    for layer in range(layers):
        assert torch.equal(similarity[layer, layer].diagonal(), torch.ones(heads))
    assert similarity.min() < 0.9  # other heads' keys are not as good


def test_gain_weighs_by_the_borrowing_layer() -> None:
    score = np.array([[0.3, 0.5], [0.7, 0.2]])
    gain = anchor_gain(score, np.array([0.1, 0.4]))
    assert gain.tolist() == [[0.1, 0.2], [pytest.approx(0.07), 0.4]]
