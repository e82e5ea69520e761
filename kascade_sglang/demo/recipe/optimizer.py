"""Muon for the weight matrices of the blocks, AdamW for the embedding and the norms."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def orthogonal(stack: Tensor) -> Tensor:
    """Bring a stack of wide matrices near to semi-orthogonal (Newton-Schulz, five rounds).

    The coefficients are those of Keller Jordan's Muon.
    """
    x = stack.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon:
    """Momentum with orthogonal updates, over stacks of matrices of one layer kind each."""

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self.weights = {name: weights[name] for name in MATRICES}
        self.momentum = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.decay = decay

    @torch.no_grad()
    def step(self, lr: float, beta: float) -> None:
        """One update from the gradients in ``.grad``, which it clears."""
        groups: dict[torch.Size, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, weight in self.weights.items():
            momentum = self.momentum[name].lerp_(weight.grad, 1 - beta)
            update = weight.grad.lerp(momentum, beta)
            update = update if update.shape[1] <= update.shape[2] else update.mT
            groups[update.shape[1:]].append((name, update))
            weight.grad = None
        for members in groups.values():
            done = orthogonal(torch.cat([update for _, update in members]))
            for (name, _), update in zip(members, done.chunk(len(members)), strict=True):
                weight = self.weights[name]
                high, wide = weight.shape[1:]
                scale = max(1.0, high / wide) ** 0.5
                weight.mul_(1 - lr * self.decay)
                weight.add_(update if high <= wide else update.mT, alpha=-lr * scale)


def adam_for_rest(weights: dict[str, Tensor]) -> torch.optim.AdamW:
    """AdamW for everything that Muon leaves; the learning rate is set before each step."""
    rest = [weight for name, weight in weights.items() if name not in MATRICES]
    return torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.97), weight_decay=0.0)
