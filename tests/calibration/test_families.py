"""Every family of decoders, tiny and random, against attention matrices of transformers' own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from kascade_kernels.budget import TILE, Budget
from kascade_sglang.calibration.answers import Selecting
from kascade_sglang.calibration.collect import MASS_RATIOS, collect, sample_tiles
from kascade_sglang.calibration.elimination import choose, run_densely
from kascade_sglang.calibration.hf_model import shape_of, windowed_layers
from kascade_sglang.calibration.limited_attention import (
    Limits,
    capped_scores,
    limited_attention,
)
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.calibration.similarity import best_heads
from kascade_sglang.errors import CalibrationError
from tests.support.brute import least_similarity, mean_mass
from tests.support.families import FAMILIES, LENGTH, SMALL, build, build_with_sinks

BUDGET = Budget(0.1, 64)


def prompt_of(length: int = LENGTH) -> list[int]:
    return torch.randint(4, 64, (length,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_attention(family: str) -> None:
    model, prompt, layers = build(family), prompt_of(), FAMILIES[family][2]
    measured = collect(model, [prompt], BUDGET)
    assert measured.layers == layers
    tiles = sample_tiles(LENGTH, BUDGET, 64, seed=0)
    similarity = least_similarity(model, prompt, tiles, BUDGET, list(layers))
    np.testing.assert_allclose(measured.similarity, similarity, atol=2e-5)
    at_ratios = [Budget(ratio, BUDGET.min_k) for ratio in MASS_RATIOS]
    mass = mean_mass(model, prompt, tiles, at_ratios, list(layers))
    np.testing.assert_allclose(measured.mass, mass, atol=2e-5)
    assert mass.min() < 0.9 and measured.importance.shape == (len(layers),)


def test_sinks_count_as_kept() -> None:
    """A model whose sinks take nearly all: whatever is left out, hardly anything is lost."""
    model = build_with_sinks(0.0)
    some = collect(model, [prompt_of()], BUDGET)
    assert some.layers == (1, 3) and some.mass.min() < 0.9
    most = collect(build_with_sinks(200.0), [prompt_of()], BUDGET)
    assert most.mass.min() > 0.999 and most.similarity.min() > 0.999


@pytest.mark.parametrize("family", ["llama3", "phi3", "gemma2", "gemma3"])
def test_importance_is_of_what_the_layer_adds(family: str) -> None:
    """Seen from outside: the stream that the feed-forward norm reads is x + update."""
    model, prompt, layers = build(family), prompt_of(), FAMILIES[family][2]
    before, after = [], []
    for layer in model.get_decoder().layers:
        norm = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: before.append((args or (kwargs["hidden_states"],))[0][0]),
            with_kwargs=True,
        )
        norm.register_forward_pre_hook(lambda m, args: after.append(args[0][0]))
    importance = collect(model, [prompt], BUDGET).importance
    expected = [
        1 - torch.cosine_similarity(x.double(), y.double(), dim=-1).mean().item()
        for x, y in zip(before, after, strict=True)
    ]
    np.testing.assert_allclose(importance, [expected[layer] for layer in layers], atol=1e-6)
    assert min(expected) > 1e-3


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_bfloat16_weights(family: str) -> None:
    exact = collect(build(family), [prompt_of()], BUDGET)
    rounded = collect(build(family).bfloat16(), [prompt_of()], BUDGET)
    assert rounded.similarity.dtype == np.float64
    np.testing.assert_allclose(rounded.mass, exact.mass, atol=0.05)
    np.testing.assert_allclose(rounded.importance, exact.importance, atol=0.05)


@pytest.mark.parametrize("name", ["Mistral", "Phi3"])
def test_refuses_prompts_longer_than_a_window_in_every_layer(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, "sliding_window": 100})
    with pytest.raises(CalibrationError, match="window of 100 .* has 101; --max-tokens 100"):
        windowed_layers(config, 101)
    assert windowed_layers(config, 100) == ()


@pytest.mark.parametrize(
    "name, changes, sentence",
    [
        ("Mamba", {}, "expected layers of full or sliding attention, got mamba"),
        ("GPT2", {}, "does not keep its attention in"),
        ("Bloom", {}, "BloomForCausalLM gives no access to its attention"),
        ("T5", {}, "expected a decoder with KV heads, got an encoder-decoder"),
        ("DeepseekV3", {}, "expected a decoder with KV heads, got latent attention"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refuses_models_without_attention_to_measure(
    name: str, changes: dict[str, Any], sentence: str
) -> None:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    with pytest.raises(CalibrationError, match=sentence):
        windowed_layers(config, LENGTH)
        shape_of(config)
        collect(AutoModelForCausalLM.from_config(config).eval(), [prompt_of()], BUDGET)


def test_a_model_spread_by_accelerate(tmp_path: Path) -> None:
    """Layers on the CPU and on disk by turns: weights move, bits stay."""
    pytest.importorskip("accelerate")
    whole, prompt = build("llama3"), prompt_of()
    whole.save_pretrained(tmp_path)
    places = {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(4)}
    places |= {"model.embed_tokens": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    one, other = (collect(model.eval(), [prompt], BUDGET) for model in (whole, spread))
    for field in ("similarity", "pooled", "mass", "importance"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    maps = torch.from_numpy(best_heads(one.similarity))
    how = Selecting((0, 1, 2, 3), maps, BUDGET)
    dense = [run_densely(model.eval(), [Prompt(prompt)], how) for model in (whole, spread)]
    chosen = [choose(sparse, how.layers, None) for sparse in dense]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("window", [1, 7, 130, 300, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_limited_attention_in_float64(window: int | None, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    length, kv_heads, group, dim, scale = 261, 2, 3, 8, 0.5
    q = torch.randn(length, kv_heads * group, dim, generator=generator).double()
    k, v = torch.randn(2, length, kv_heads, dim, generator=generator).double()
    logits = torch.einsum("nhd,lhd->hnl", q, k.repeat_interleave(group, 1)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    expected = torch.einsum("hnl,lhd->nhd", weights, v.repeat_interleave(group, 1))
    found = limited_attention(q, k, v, scale, Limits(window, softcap))
    torch.testing.assert_close(found, expected)


def test_capped_scores_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(TILE, 6, 8, generator=generator).double()
    k = torch.randn(4 * TILE, 2, 8, generator=generator).double()
    logits = torch.einsum("nhd,lhd->hnl", q, k.repeat_interleave(3, 1))
    logits = 2 * torch.tanh(logits / 2)
    later = torch.arange(3 * TILE, 4 * TILE)[:, None] < torch.arange(4 * TILE)
    weights = logits.masked_fill(later, float("-inf")).softmax(-1)
    expected = weights.reshape(2, 3 * TILE, -1).sum(1)[:, : 3 * TILE]
    torch.testing.assert_close(capped_scores(q, k, 1.0, Limits(softcap=2.0)), expected)
