"""The ``kascade`` attention backend: which layer does what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kascade_sglang.backend.attention import attend, select
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.metadata import StepMetadata
from kascade_sglang.backend.metrics import KeyCounter
from kascade_sglang.compat import (
    AttentionBackend,
    build_dense_backend,
    is_plain_decoder_layer,
    key_value_caches,
    local_kv_heads,
    write_kv,
)
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError
from kascade_sglang.plan.schema import LayerRole

if TYPE_CHECKING:
    from kascade_sglang.compat import ForwardBatch, ModelRunner, RadixAttention


class KascadeAttnBackend(AttentionBackend):
    """Anchor layers select keys, reuse layers attend to them, layer 0 attends to everything.

    One instance serves one model runner. State between layers lives here for one step.
    """

    needs_cpu_seq_lens = True

    def __init__(self, runner: ModelRunner, config: KascadeConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = build_dense_backend(runner, config.dense_backend)
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.max_context_len = runner.model_config.context_len
        self.index_store = IndexStore(config, local_kv_heads(runner), runner.device)
        self.counter = KeyCounter()
        self.step: StepMetadata | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Cut this step's queries into tiles; once a step, before any layer."""
        self.index_store.clear()
        self.dense.init_forward_metadata(forward_batch)
        self.step = StepMetadata.build(
            forward_batch, self.req_to_token_pool.req_to_token, self.config.budget
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Refuse capture: eager torch chooses shapes by length, which a graph would freeze."""
        raise KascadeError("CUDA graphs: kascade computes eagerly; pass --disable-cuda-graph")

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of one new token a request: [tokens, query heads * head dim]."""
        dense = self.dense.forward_decode
        return self._forward(dense, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of new tokens after a cached prefix: [tokens, query heads * head dim]."""
        dense = self.dense.forward_extend
        return self._forward(dense, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _forward(
        self,
        dense_forward: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
        save_kv_cache: bool,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not is_plain_decoder_layer(layer) or k is None or kwargs:
            raise KascadeError(
                f"layer {layer.layer_id}: expected plain causal self-attention, got "
                f"{sorted(kwargs) or 'another kind'}; serve with another --attention-backend"
            )
        role = self.config.plan.role(layer.layer_id)
        if role is LayerRole.DENSE:
            out = dense_forward(q, k, v, layer, batch, save_kv_cache)
            self._select(q, layer)
            self.counter.add_dense(self.step)
            return out
        if save_kv_cache:
            write_kv(self.token_to_kv_pool, layer, batch, k, v)
        if role is LayerRole.ANCHOR:
            self._select(q, layer)
        return self._attend(q, layer)

    def _select(self, q: torch.Tensor, layer: RadixAttention) -> None:
        keys, _ = key_value_caches(self.token_to_kv_pool, layer.layer_id)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        selection = select(queries, keys, self.step, self.config, layer.layer_id, layer.scaling)
        self.index_store.put(layer.layer_id, selection)
        self.counter.add_scored(self.step, self.config.selection)

    def _attend(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        keys, values = key_value_caches(self.token_to_kv_pool, layer.layer_id)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        selection = self.index_store.get(layer.layer_id)
        self.counter.add_attended(self.step, selection)
        return attend(queries, keys, values, self.step, selection, layer.scaling).view_as(q)
