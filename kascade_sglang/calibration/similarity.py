"""How well one layer's Top-k keys serve another: functions of arrays, no I/O.

Index order throughout: ``[i, j, h_j, h_i]``: layer ``j``'s KV head ``h_j`` borrows the keys of
layer ``i``'s head ``h_i`` (arXiv 2512.16391, sections 3.3 and 3.4).
"""

from collections.abc import Sequence

import numpy as np
import torch

from kascade_kernels.reference import select_topk


def recovered_mass(scores: torch.Tensor, own: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Attention mass that each row keeps when it attends to each of several key sets.

    scores: [R, C] mass of every candidate key. own: [R] mass of the tile's own keys, always
    attended. selected: int64 [S, count] key sets. Returns [R, S] in the scores' dtype.
    """
    # One product with 0/1 columns: a gather would hold R x S x count numbers at once.
    member = torch.zeros(len(selected), scores.shape[1], dtype=scores.dtype, device=scores.device)
    member.scatter_(1, selected, 1.0)
    return scores @ member.T + own.unsqueeze(1)


def tile_similarity(scores: torch.Tensor, own: torch.Tensor, count: int) -> torch.Tensor:
    """Mass recovered with another head's Top-k over mass recovered with one's own, for one tile.

    scores: [layers, H, C]. own: [layers, H]. count: keys selected. Returns
    [layers, layers, H, H], at most 1: a head's own Top-k recovers the most there is.
    """
    layers, heads, _ = scores.shape
    rows = scores.flatten(0, 1)
    mass = recovered_mass(rows, own.flatten(), select_topk(rows, count))
    # Rounding can leave a borrowed set a few ulps above one's own.
    share = (mass / mass.diagonal().unsqueeze(1)).clamp_(max=1.0)
    return share.reshape(layers, heads, layers, heads).permute(2, 0, 1, 3)


def own_mass(scores: torch.Tensor, own: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Share of all attention mass that each head's own Top-k recovers, at several k.

    scores: [layers, H, C]; own: [layers, H], the tile's own keys, always attended.
    Returns [len(counts), layers, H], at most 1.
    """
    largest = scores.topk(max(counts), dim=-1).values
    kept = torch.stack([largest[..., :count].sum(dim=-1) + own for count in counts])
    return (kept / (scores.sum(dim=-1) + own)).clamp_(max=1.0)


def layer_similarity(similarity: np.ndarray) -> np.ndarray:
    """[layers, layers, H, H] -> [layers, layers]: each head takes its best, heads average."""
    return similarity.max(axis=-1).mean(axis=-1)


def best_heads(similarity: np.ndarray) -> np.ndarray:
    """[M, M, H, H] -> int64 [M, M, H]: whose keys each head would borrow; a layer's own for itself.

    Ties go to the lower head, as in a plan's head map.
    """
    best = similarity.argmax(axis=-1)
    layers = np.arange(len(best))
    best[layers, layers] = np.arange(best.shape[-1])
    return best


def anchor_gain(layer_score: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Worth of serving layer ``j`` from anchor ``i``: ``[i, j]`` similarity x importance_j.

    An anchor serves itself perfectly. Entries with i > j have no meaning.
    """
    gain = layer_score * importance
    np.fill_diagonal(gain, importance)
    return gain
