"""The definitions of calibration written out with full attention matrices, in loops."""

import numpy as np
import torch
from transformers import PreTrainedModel

from kascade_kernels.budget import TILE, Budget


def pooled_attention(
    model: PreTrainedModel, prompt: list[int], tiles: list[int], layers: list[int]
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per tile and layer: float64 [H, keys before the tile], and the tile's own mass [H]."""
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            maps = model(torch.tensor([prompt]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    kv_heads = model.config.num_key_value_heads
    pooled = []
    for tile in tiles:
        start, row = TILE * tile, []
        for layer in layers:
            queries = maps[layer][0, :, start : start + TILE].double()
            mass = queries.reshape(kv_heads, -1, len(prompt)).sum(1)
            row.append((mass[:, :start], mass[:, start:].sum(1)))
        pooled.append(row)
    return pooled


def least_similarity(
    model: PreTrainedModel,
    prompt: list[int],
    tiles: list[int],
    budget: Budget,
    layers: list[int],
) -> np.ndarray:
    """[layers, layers, H, H], the least over tiles."""
    kv_heads = model.config.num_key_value_heads
    least = np.ones((len(layers), len(layers), kv_heads, kv_heads))
    for tile, pooled in zip(tiles, pooled_attention(model, prompt, tiles, layers), strict=True):
        best = [scores.topk(budget.selected(tile)).indices for scores, _ in pooled]
        for i in range(len(layers)):
            for j, (scores, own) in enumerate(pooled):
                for mine in range(kv_heads):
                    full = scores[mine, best[j][mine]].sum() + own[mine]
                    for theirs in range(kv_heads):
                        part = scores[mine, best[i][theirs]].sum() + own[mine]
                        share = float(part / full)
                        least[i, j, mine, theirs] = min(least[i, j, mine, theirs], share)
    return least


def mean_mass(
    model: PreTrainedModel,
    prompt: list[int],
    tiles: list[int],
    budgets: list[Budget],
    layers: list[int],
) -> np.ndarray:
    """[budgets, layers, H]: share that a head's own Top-k recovers, the mean over tiles."""
    shares = np.zeros((len(budgets), len(layers), model.config.num_key_value_heads))
    for tile, pooled in zip(tiles, pooled_attention(model, prompt, tiles, layers), strict=True):
        for row, budget in enumerate(budgets):
            for column, (scores, own) in enumerate(pooled):
                kept = scores.topk(budget.selected(tile)).values.sum(1) + own
                shares[row, column] += (kept / (scores.sum(1) + own)).numpy()
    return shares / len(tiles)
