"""What the backend reads of SGLang's objects, as facts: a rank, a step's batch, a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kascade_sglang.host.runtime import key_value_scales, local_kv_heads, local_layers

if TYPE_CHECKING:
    from kascade_sglang.host.runtime import ForwardBatch, ModelRunner, RadixAttention


@dataclass(frozen=True)
class Rank:
    """What one rank holds of the model and of the KV cache.

    heads, layers: the model's KV heads and layers that are here.
    table: int32 [requests, context], the KV slot of every position of every request.
    slots: tokens of the KV pool, padding included.
    reports_metrics: whether this rank counts for ``/metrics``.
    """

    heads: range
    layers: range
    table: torch.Tensor
    slots: int
    device: str
    reports_metrics: bool = False

    @staticmethod
    def of(runner: ModelRunner) -> Rank:
        """Read a model runner whose pools exist."""
        heads, pool = local_kv_heads(runner), runner.token_to_kv_pool
        return Rank(
            heads=heads,
            layers=local_layers(runner),
            table=runner.req_to_token_pool.req_to_token,
            slots=pool.size + pool.page_size,
            device=runner.device,
            # Tensor-parallel ranks read alike, so the first one counts for all.
            reports_metrics=runner.server_args.enable_metrics and 0 in heads,
        )


@dataclass(frozen=True)
class Batch:
    """The requests of one step and their new tokens.

    decode: whether each request has one new token, the case that graphs are captured for.
    requests: int64 [requests], rows of the slot table. ends: int [requests], keys that each
        request has after the step. Both on the device.
    written: int64 [tokens], slots of the new tokens.
    ends_cpu: int [requests]; None while a graph is captured.
    prefixes_cpu: keys before the new tokens, on the host; None in decoding.
    padding: last requests, which only fill a graph's batch.
    """

    decode: bool
    requests: torch.Tensor
    ends: torch.Tensor
    written: torch.Tensor
    ends_cpu: np.ndarray | None = None
    prefixes_cpu: Sequence[int] | None = None
    padding: int = 0

    @staticmethod
    def of(batch: ForwardBatch) -> Batch:
        """Read a forward batch."""
        decode = batch.forward_mode.is_decode()
        prefixes = None if decode else [int(prefix) for prefix in batch.extend_prefix_lens_cpu]
        if decode:
            lengths = getattr(batch, "seq_lens_cpu", None)
            ends = None if lengths is None else lengths.numpy()
        else:
            new = np.array([int(n) for n in batch.extend_seq_lens_cpu], dtype=np.int64)
            ends = np.array(prefixes, dtype=np.int64) + new
        return Batch(
            decode=decode,
            requests=batch.req_pool_indices,
            ends=batch.seq_lens,
            written=batch.out_cache_loc,
            ends_cpu=ends,
            prefixes_cpu=prefixes,
            padding=getattr(batch, "num_padding", 0),
        )

    @property
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions [begin, end) that each request computes, int64 [requests] each."""
        begins = self.ends_cpu - 1 if self.prefixes_cpu is None else np.array(self.prefixes_cpu)
        return begins.astype(np.int64), self.ends_cpu


@dataclass(frozen=True)
class Layer:
    """What attention needs of a layer.

    scale: a logit is q.k * scale, with k as it is stored.
    v_scale: a value is what is stored times that; None where the pool holds values themselves.
    """

    index: int
    scale: float
    v_scale: float | None = None

    @staticmethod
    def of(layer: RadixAttention, fp8: bool) -> Layer:
        """Read SGLang's layer; fp8: whether the pool holds its keys and values in 8 bits."""
        if not fp8:
            return Layer(layer.layer_id, layer.scaling)
        k_scale, v_scale = key_value_scales(layer)
        return Layer(layer.layer_id, layer.scaling * k_scale, v_scale)
