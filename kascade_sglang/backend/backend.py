"""The ``kascade`` attention backend: which layer does what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kascade_sglang.backend.key_counter import KeyCounter
from kascade_sglang.backend.paths import AnyPath, AnyRunning, KernelPaths, build_paths
from kascade_sglang.backend.published import publish
from kascade_sglang.backend.warm_up import warm_up, warm_up_decode
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.runtime import Backend, build_dense_backend, model_dtype, sinks_of
from kascade_sglang.host.steps import (
    Batch,
    Layer,
    Rank,
    asks_of,
    is_idle,
    queries_of,
    written_slots,
)
from kascade_sglang.plan.schema import LayerRole

if TYPE_CHECKING:
    from kascade_sglang.host.runtime import ForwardBatch, ModelRunner, RadixAttention


SINKS = "sinks"
"""What a model may give with q, k and v: a logit of each query head."""


class KascadeAttnBackend(Backend):
    """Anchor layers select keys, reuse layers attend to them, layer 0 attends to everything.

    Layers with a sliding window are the dense backend's, in prefill and in decoding.
    One instance serves one model runner. State between layers lives here for one step: the step
    in ``running`` (None where all of it is dense), the last anchor's selection in its store.
    """

    def __init__(self, runner: ModelRunner, config: KascadeConfig) -> None:
        super().__init__(runner)
        rank = Rank.of(runner)
        self.config, self._runner = config, runner
        self.dense = build_dense_backend(runner, config.dense_backend)
        self.paths = build_paths(rank, self.token_to_kv_pool, config)
        self.running: AnyRunning | None = None
        self.has_windows = any(layer in rank.layers for layer in config.plan.windowed)
        # What decodes without the host needs no lengths there; what counts keys does, and the
        # delegate may, for prefill.
        decodes_alone = self.paths.decode.attends_densely
        counts = rank.reports_metrics
        self.needs_cpu_seq_lens = counts or not decodes_alone or self.dense.needs_cpu_seq_lens
        self.counter = KeyCounter(config, rank.layers, self.paths.sizes.context) if counts else None
        # Every stage has every request.
        publish(config, metrics=counts, requests=counts and 0 in rank.layers)
        anchors = [layer for layer in config.plan.anchors if layer in rank.layers]
        # What runs in Triton's interpreter, or in torch, is not compiled.
        if anchors and rank.device.startswith("cuda") and isinstance(self.paths, KernelPaths):
            self._warm_up(self.paths, rank, anchors)

    def _warm_up(self, paths: KernelPaths, rank: Rank, anchors: list[int]) -> None:
        """Compile what no graph's capture will."""
        dtype, config = model_dtype(self._runner), self.config
        v_scale = 1.0 if config.fp8 else None
        # Up to the first that scores a pool, if any, there is one of each kind.
        last = next((anchor for anchor in anchors if anchor in config.plan.maker_of), anchors[0])
        kinds = [anchor for anchor in anchors if anchor <= last]
        layers = [Layer(anchor, 1.0, v_scale, sinks_of(self._runner)) for anchor in kinds]
        if config.sparse_prefill:
            warm_up(paths, layers[0], dtype)
        if rank.eager:
            warm_up_decode(paths, layers, rank.captured, rank.eager, dtype)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare an eager step; once a step, before any layer."""
        if is_idle(forward_batch):
            return
        batch = Batch.of(forward_batch, asks_of(self._runner))
        path = self._path(batch)
        if self.has_windows or path is None or not path.attends_densely:
            self.dense.init_forward_metadata(forward_batch)
        if path is not None:
            path.prepare(batch)
        self._begin(batch)
        self._count(batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured decode steps of up to ``max_bs`` requests use."""
        self.paths.decode.reserve(max_bs)
        if self.has_windows:
            self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a request that pads a batch."""
        return 1

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Take from SGLang's slot table what a replay needs; the graph reads lengths itself."""
        batch = Batch.of(forward_batch, () if in_capture else asks_of(self._runner))
        path = self._path(batch)
        if path is not None:
            path.prepare(batch)
        if self.has_windows:
            self.dense.init_forward_metadata_out_graph(forward_batch, in_capture)
        if not in_capture:
            self._count(batch)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Record the rest of a decode step's preparation."""
        batch = Batch.of(forward_batch)
        self._begin(batch)
        if self.has_windows:
            self.dense.init_forward_metadata_in_graph(forward_batch)

    def on_after_cuda_graph_warmup(self) -> None:
        """Undo what the warm-up before a capture changed."""
        if self.has_windows:
            self.dense.on_after_cuda_graph_warmup()

    def update_verify_buffers_to_fill_after_draft(
        self, spec_info: object, cuda_graph_bs: int | None
    ) -> None:
        """Do nothing: a chain's rows depend on lengths alone, not on what was drafted."""

    def _path(self, batch: Batch) -> AnyPath | None:
        """What computes a step; None where the dense backend computes all of it."""
        if batch.decode:
            return self.paths.decode
        return self.paths.extend if self.config.sparse_prefill else None

    def _begin(self, batch: Batch) -> None:
        self.running = None if self._path(batch) is None else self.paths.begin(batch)

    def _count(self, batch: Batch) -> None:
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
        **kwargs: torch.Tensor | None,
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
        **kwargs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of new tokens after others, or of drafts: [tokens, query heads * head dim]."""
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
        **kwargs: torch.Tensor | None,
    ) -> torch.Tensor:
        facts = Layer.of(layer, self.config.fp8, kwargs.get(SINKS))
        if k is None or kwargs.keys() - {SINKS}:
            raise KascadeError(
                f"layer {facts.index}: expected q, k, v and sinks, got "
                f"{sorted(kwargs) or 'no k'}; serve with another --attention-backend"
            )
        role, written = self.config.plan.role(facts.index), written_slots(batch)
        running = self.running
        if running is None or role is LayerRole.WINDOW:
            out = dense_forward(q, k, v, layer, batch, save_kv_cache, **kwargs)
            self.paths.kv.copy(facts.index, written)
            return out
        queries = queries_of(q, layer)
        if role is LayerRole.DENSE and not running.path.attends_densely:
            out = dense_forward(q, k, v, layer, batch, save_kv_cache, **kwargs)
            self.paths.kv.copy(facts.index, written)
            running.select(queries, facts)
            return out
        if save_kv_cache:
            self.paths.kv.write(layer, batch, k, v)
        if role is not LayerRole.REUSE:
            self.paths.kv.copy(facts.index, written)
        if role is LayerRole.DENSE:
            all_keys = torch.empty_like(queries)
            running.select(queries, facts, all_keys)
            return all_keys.view_as(q)
        if role is LayerRole.ANCHOR:
            running.select(queries, facts)
        return running.attend(queries, facts).view_as(q)
