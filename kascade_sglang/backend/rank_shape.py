"""The part of the model that one rank computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kascade_sglang.compat import local_kv_heads, local_layers

if TYPE_CHECKING:
    from kascade_sglang.compat import ModelRunner
    from kascade_sglang.config import KascadeConfig


@dataclass(frozen=True)
class RankShape:
    """Sizes that buffers depend on.

    heads: the model's KV heads held here. layers: the model's layers held here.
    context: positions in one row of the slot table. slots: tokens of the KV pool.
    lists: selections per query tile: one for each KV head, or 1 where they are pooled.
    """

    heads: range
    q_heads: int
    head_dim: int
    layers: range
    context: int
    slots: int
    lists: int
    device: str

    @property
    def kv_heads(self) -> int:
        """Number of KV heads held here."""
        return len(self.heads)

    @staticmethod
    def of(runner: ModelRunner, config: KascadeConfig) -> RankShape:
        """Read the shape off a model runner whose pools exist."""
        heads, shape = local_kv_heads(runner), config.plan.shape
        return RankShape(
            heads=heads,
            q_heads=len(heads) * shape.q_heads // shape.kv_heads,
            head_dim=shape.head_dim,
            layers=local_layers(runner),
            context=runner.req_to_token_pool.req_to_token.shape[1],
            slots=runner.token_to_kv_pool.size + runner.token_to_kv_pool.page_size,
            lists=1 if config.pooled else len(heads),
            device=runner.device,
        )
