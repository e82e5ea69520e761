"""Sizes that buffers depend on."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from kascade_kernels.budget import TILE
from kascade_sglang.config import KascadeConfig


@dataclass(frozen=True)
class Sizes:
    """What one rank computes.

    kv_heads, q_heads: heads of a layer on this rank. context: positions a request may have.
    lists: selections per query tile: one for each KV head, or 1 where they are pooled.
    longest_list: slots on the list of the context's last position in decoding, own tile
        included. longest_prefill_list: those of the last tile in prefill, without its own.
        longest_pool: slots of the context's last candidate pool in decoding, own tile included;
        0 where there are none.
        All also hold what one request may ask for (``max_topk_ratio``).
    chain: tokens that a decode step computes for each request, a row each.
    """

    kv_heads: int
    q_heads: int
    head_dim: int
    context: int
    lists: int
    longest_list: int
    longest_prefill_list: int
    chain: int = 1
    longest_pool: int = 0

    @staticmethod
    def of(config: KascadeConfig, kv_heads: int, context: int, chain: int = 1) -> Sizes:
        """Return the sizes of a rank that holds ``kv_heads`` of the model's KV heads."""
        model = config.plan.shape
        return Sizes(
            kv_heads=kv_heads,
            q_heads=kv_heads * model.q_heads // model.kv_heads,
            head_dim=model.head_dim,
            context=context,
            lists=1 if config.pooled else kv_heads,
            longest_list=config.most_selected("decode", context) + TILE,
            longest_prefill_list=config.most_selected("prefill", context),
            chain=chain,
            longest_pool=config.most_pooled(context) + TILE if config.pool_rule else 0,
        )

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_heads // self.kv_heads


def runs_kernels(device: str, config: KascadeConfig) -> bool:
    """Whether steps run through the kernels: on a GPU or in Triton's interpreter."""
    return config.selection == "topk" and (
        device.startswith("cuda") or triton.knobs.runtime.interpret
    )


def copied_layers(config: KascadeConfig, layers: range) -> list[int]:
    """Layers that score with 8-bit copies of their keys; none where the pool's have 8 bits."""
    if config.exact or config.fp8:
        return []
    return [layer for layer in config.plan.anchors if layer in layers]
