"""What the backend reads of SGLang's objects, as facts: a rank, a step's batch, a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.host.runtime import key_value_scales, local_kv_heads, local_layers
from kascade_sglang.host.server import largest_decodes
from kascade_sglang.host.speculation import chain_length

if TYPE_CHECKING:
    from kascade_sglang.asks import Ask
    from kascade_sglang.host.runtime import ForwardBatch, ModelRunner, RadixAttention

LIKELY = 64
"""Requests that run together at least now and then, where SGLang chooses how many may."""


@dataclass(frozen=True)
class Rank:
    """What one rank holds of the model and of the KV cache.

    heads, layers: the model's KV heads and layers that are here.
    table: int32 [requests, context], the KV slot of every position of every request.
    slots: tokens of the KV pool, padding included.
    reports_metrics: whether this rank counts for ``/metrics``.
    captured: most requests of a decode step that runs as a graph.
    eager: most of one that does not, 0 where all do; where nobody set a limit, those that are
        likely.
    chain: tokens that a decode step computes for each request.
    """

    heads: range
    layers: range
    table: torch.Tensor
    slots: int
    device: str
    reports_metrics: bool = False
    captured: int = 0
    eager: int = 0
    chain: int = 1

    @staticmethod
    def of(runner: ModelRunner) -> Rank:
        """Read a model runner whose pools exist."""
        heads, pool = local_kv_heads(runner), runner.token_to_kv_pool
        table = runner.req_to_token_pool.req_to_token
        captured, given = largest_decodes(runner.server_args)
        # The table has a row for padding.
        likely = min(max(2 * captured, LIKELY), len(table) - 1)
        return Rank(
            heads=heads,
            layers=local_layers(runner),
            table=table,
            slots=pool.size + pool.page_size,
            device=runner.device,
            # Tensor-parallel ranks read alike, so the first one counts for all.
            reports_metrics=runner.server_args.enable_metrics and 0 in heads,
            captured=captured,
            eager=given or (likely if likely > captured else 0),
            chain=chain_length(runner.server_args),
        )


@dataclass(frozen=True)
class Batch:
    """The requests of one step and their new tokens.

    decode: whether each request has ``chain`` new tokens, the case that graphs are captured for.
    requests: int64 [requests], rows of the slot table. ends: int [requests], keys that each
        request has after the step. Both on the device.
    written: int64 [tokens], slots of the new tokens.
    ends_cpu: int [requests]; None while a graph is captured.
    prefixes_cpu: keys before the new tokens, on the host; None in decoding.
    padding: last requests, which only fill a graph's batch.
    budgets: by request, what some asked for in this phase; None is the server's budget. Empty
        where nobody asked; it may be shorter than ``requests``.
    chain: in decoding, new tokens of each request: one, or a chain of drafts to verify, each the
        next one's past. Every one of them is a row.
    """

    decode: bool
    requests: torch.Tensor
    ends: torch.Tensor
    written: torch.Tensor
    ends_cpu: np.ndarray | None = None
    prefixes_cpu: Sequence[int] | None = None
    padding: int = 0
    budgets: tuple[Budget | None, ...] = ()
    chain: int = 1

    @staticmethod
    def of(batch: ForwardBatch, asks: Sequence[Ask | None] = ()) -> Batch:
        """Read a forward batch. asks: by request, what some asked for."""
        verify = batch.forward_mode.is_target_verify()
        decode = verify or batch.forward_mode.is_decode()
        chain = batch.spec_info.draft_token_num if verify else 1
        # SGLang counts a decode step's new token, and no draft of a chain.
        more = chain if verify else 0
        prefixes = None if decode else [int(prefix) for prefix in batch.extend_prefix_lens_cpu]
        if decode:
            lengths = getattr(batch, "seq_lens_cpu", None)
            ends = None if lengths is None else lengths.numpy() + more
        else:
            new = np.array([int(n) for n in batch.extend_seq_lens_cpu], dtype=np.int64)
            ends = np.array(prefixes, dtype=np.int64) + new
        return Batch(
            decode=decode,
            requests=batch.req_pool_indices,
            ends=batch.seq_lens + more if more else batch.seq_lens,
            written=batch.out_cache_loc,
            ends_cpu=ends,
            prefixes_cpu=prefixes,
            padding=getattr(batch, "num_padding", 0),
            budgets=tuple(ask and (ask.decode if decode else ask.prefill) for ask in asks),
            chain=chain,
        )

    @property
    def row_ends(self) -> torch.Tensor:
        """Keys that each token of a decode step sees, its own included: int [requests * chain]."""
        if self.chain == 1:
            return self.ends
        before = torch.arange(1 - self.chain, 1, dtype=self.ends.dtype, device=self.ends.device)
        return (self.ends[:, None] + before).flatten()

    @property
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions [begin, end) that each request computes, int64 [requests] each."""
        decode = self.prefixes_cpu is None
        begins = self.ends_cpu - self.chain if decode else np.array(self.prefixes_cpu)
        return begins.astype(np.int64), self.ends_cpu


@dataclass(frozen=True)
class Layer:
    """What attention needs of a layer.

    scale: a logit is q.k * scale, with k as it is stored.
    v_scale: a value is what is stored times that; None where the pool holds values themselves.
    sinks: [Hq] of this rank's query heads, where the layer has them.
    """

    index: int
    scale: float
    v_scale: float | None = None
    sinks: torch.Tensor | None = None

    @staticmethod
    def of(layer: RadixAttention, fp8: bool, sinks: torch.Tensor | None = None) -> Layer:
        """Read SGLang's layer; fp8: whether the pool holds its keys and values in 8 bits.

        sinks: those that the model gave with its call.
        """
        if not fp8:
            return Layer(layer.layer_id, layer.scaling, sinks=sinks)
        k_scale, v_scale = key_value_scales(layer)
        return Layer(layer.layer_id, layer.scaling * k_scale, v_scale, sinks)


def is_idle(batch: ForwardBatch) -> bool:
    """Whether a step has no requests."""
    return batch.forward_mode.is_idle()


def written_slots(batch: ForwardBatch) -> torch.Tensor:
    """Return the slots of a step's new tokens, int64 [tokens]."""
    return batch.out_cache_loc


def queries_of(q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
    """Return what a model gives as queries, [tokens, Hq * D], as [tokens, Hq, D]."""
    # Gemma 3 turns heads and tokens round, and leaves the numbers where they were.
    return q.view(-1, layer.tp_q_head_num, layer.qk_head_dim).contiguous()


ASKS = "kascade_asks"
"""Attribute of a model runner: what the requests of its latest batch asked for, in their order."""


def set_asks(runner: ModelRunner, asks: Sequence[Ask | None]) -> None:
    """Say what each request of the step to come asked for; empty where nobody did."""
    setattr(runner, ASKS, asks)


def asks_of(runner: ModelRunner) -> Sequence[Ask | None]:
    """Return what the requests of the current step asked for."""
    return getattr(runner, ASKS, ())
