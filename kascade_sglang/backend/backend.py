"""The ``kascade`` attention backend: which layer does what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kascade_sglang.backend.metrics import KeyCounter
from kascade_sglang.backend.paths import build_paths
from kascade_sglang.compat import (
    AttentionBackend,
    build_dense_backend,
    is_plain_decoder_layer,
    key_value_caches,
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

    def __init__(self, runner: ModelRunner, config: KascadeConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = build_dense_backend(runner, config.dense_backend)
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.max_context_len = runner.model_config.context_len
        self.paths = build_paths(runner, config)
        self.path = self.paths.extend
        # What decodes without the host needs no lengths there; the delegate may, for prefill.
        self.needs_cpu_seq_lens = self.paths.decode.delegates_dense or self.dense.needs_cpu_seq_lens
        shape = self.paths.shape
        # Tensor-parallel ranks read alike, so the first one counts for all.
        counts = runner.server_args.enable_metrics and 0 in shape.heads
        self.counter = KeyCounter(config, shape.layers, shape.context) if counts else None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare an eager step; once a step, before any layer."""
        if forward_batch.forward_mode.is_idle():
            return
        decode = forward_batch.forward_mode.is_decode()
        self._enter(self.paths.decode if decode else self.paths.extend)
        if self.path.delegates_dense:
            self.dense.init_forward_metadata(forward_batch)
        self.path.begin(forward_batch)
        self._count(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured decode steps of up to ``max_bs`` requests use."""
        self.paths.decode.reserve(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a request that pads a batch."""
        return 1

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Take from SGLang's slot table what a replay needs; the graph reads lengths itself."""
        self.paths.decode.copy_slots(forward_batch)
        if not in_capture:
            self._count(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Record the rest of a decode step's preparation."""
        self._enter(self.paths.decode)
        self.path.begin_in_graph(forward_batch)

    def _enter(self, path: Any) -> None:
        self.path = path
        self.paths.store.clear()

    def _count(self, batch: ForwardBatch) -> None:
        if self.counter is not None:
            self.counter.add(batch)

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
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if role is LayerRole.DENSE and self.path.delegates_dense:
            out = dense_forward(q, k, v, layer, batch, save_kv_cache)
            self._copy_keys(layer, batch)
            self.path.select(queries, layer)
            return out
        if save_kv_cache:
            write_kv(self.token_to_kv_pool, layer, batch, k, v)
        self._copy_keys(layer, batch)
        if role is LayerRole.DENSE:
            return self.path.attend_all(queries, layer).view_as(q)
        if role is LayerRole.ANCHOR:
            self.path.select(queries, layer)
        return self.path.attend(queries, layer).view_as(q)

    def _copy_keys(self, layer: RadixAttention, batch: ForwardBatch) -> None:
        keys, _ = key_value_caches(self.token_to_kv_pool, layer.layer_id)
        self.paths.copies.write(layer.layer_id, keys, batch.out_cache_loc)
