"""Statistics of a tiny model against the definitions written out with full attention matrices."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from kascade_kernels.budget import TILE, Budget
from kascade_sglang.calibration.collect import MASS_RATIOS, collect, sample_tiles, work_of
from kascade_sglang.errors import CalibrationError
from tests.support.brute import least_similarity, mean_mass

BUDGET = Budget(0.1, 64)


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(4, 64, (count, length), generator=generator).tolist()


def test_similarity_is_least_over_tiles_and_mean_over_prompts(llama: LlamaForCausalLM) -> None:
    both = prompts(2, 6 * TILE + 5)
    measured = collect(llama, both, BUDGET)
    tiles = [2, 3, 4, 5]
    assert sample_tiles(6 * TILE + 5, BUDGET, 64, seed=0) == tiles
    layers = [0, 1, 2, 3]
    expected = np.mean(
        [least_similarity(llama, prompt, tiles, BUDGET, layers) for prompt in both], axis=0
    )
    assert expected.min() < 0.9
    np.testing.assert_allclose(measured.similarity, expected, atol=1e-5)
    at_ratios = [Budget(ratio, 64) for ratio in MASS_RATIOS]
    mass = np.mean([mean_mass(llama, prompt, tiles, at_ratios, layers) for prompt in both], axis=0)
    np.testing.assert_allclose(measured.mass, mass, atol=1e-5)
    assert measured.layers == (0, 1, 2, 3)
    assert (measured.prompts, measured.tokens, measured.tiles) == (2, 2 * (6 * TILE + 5), 8)


def test_importance_is_the_turn_of_the_residual_stream(llama: LlamaForCausalLM) -> None:
    prompt = prompts(1, 4 * TILE)[0]
    inputs, outputs = [], []
    hooks = [
        hook
        for layer in llama.model.layers
        for hook in (
            layer.register_forward_hook(lambda m, args, out: inputs.append(args[0][0])),
            layer.self_attn.register_forward_hook(lambda m, args, out: outputs.append(out[0][0])),
        )
    ]
    with torch.inference_mode():
        llama(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    expected = [
        1 - torch.cosine_similarity(x.double(), (x + update).double(), dim=-1).mean().item()
        for x, update in zip(inputs, outputs, strict=True)
    ]
    measured = collect(llama, [prompt], BUDGET).importance
    np.testing.assert_allclose(measured, expected, atol=1e-6)
    assert min(expected) > 1e-3


def test_streaming_one_tile_at_a_time_gives_the_whole(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts(1, 7 * TILE)[0]
    whole = collect(llama, [prompt], BUDGET)
    singles = []
    for tile in sample_tiles(len(prompt), BUDGET, 64, seed=0):
        monkeypatch.setattr(
            "kascade_sglang.calibration.collect.sample_tiles", lambda *_, only=tile: [only]
        )
        singles.append(collect(llama, [prompt], BUDGET))
    assert len(singles) == 5
    for field in ("similarity", "pooled"):
        least = np.min([getattr(single, field) for single in singles], axis=0)
        np.testing.assert_array_equal(least, getattr(whole, field))
    np.testing.assert_allclose(np.mean([single.mass for single in singles], axis=0), whole.mass)


def test_pooled_similarity_is_one_number_per_pair_of_layers(llama: LlamaForCausalLM) -> None:
    measured = collect(llama, prompts(1, 6 * TILE), BUDGET)
    assert measured.pooled.shape == (4, 4)
    assert np.array_equal(measured.pooled.diagonal(), np.ones(4))
    assert 0 < measured.pooled.min() < 1


def test_model_is_left_as_it_was(llama: LlamaForCausalLM) -> None:
    def state() -> list[object]:
        hooks = [len(module._forward_hooks) for module in llama.modules()]
        return [llama.config._attn_implementation, hooks]

    before = state()
    collect(llama, prompts(1, 4 * TILE), BUDGET)
    assert state() == before


def test_refuses_a_prompt_without_sparse_tiles(llama: LlamaForCausalLM) -> None:
    with pytest.raises(CalibrationError, match="no tile is long enough"):
        collect(llama, prompts(1, 2 * TILE), BUDGET)


@pytest.mark.parametrize("part", ["q_proj", "o_proj"])
def test_refuses_attention_that_is_not_finite(llama: LlamaForCausalLM, part: str) -> None:
    """In the last layer, where nothing downstream would show it."""
    model = deepcopy(llama)
    getattr(model.model.layers[-1].self_attn, part).weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite; try --dtype float32"):
        collect(model, prompts(1, 4 * TILE), BUDGET)


def test_says_how_much_work_is_done(llama: LlamaForCausalLM) -> None:
    done = []
    collect(llama, prompts(2, 6 * TILE), BUDGET, tiles_per_prompt=3, on_work=done.append)
    assert len(done) == 2 * 3
    assert sum(done) == pytest.approx(2 * work_of(6 * TILE, 4))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 7, 64])
def test_sampled_tiles_are_spread_sparse_and_full(count: int, seed: int) -> None:
    length = 200 * TILE + 31
    tiles = sample_tiles(length, Budget(), count, seed)
    assert len(tiles) == count == len(set(tiles)) and tiles == sorted(tiles)
    assert not any(Budget().is_dense(tile) for tile in tiles) and tiles[-1] < 200
    if count > 1:
        gaps = np.diff(tiles)
        assert gaps.max() - gaps.min() <= 1
    assert tiles == sample_tiles(length, Budget(), count, seed)
