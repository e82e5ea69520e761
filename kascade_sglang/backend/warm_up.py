"""Compile the kernels of prefill and of eager decode steps before a request waits for them."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from kascade_kernels.budget import TILE
from kascade_sglang.backend.paths import Paths
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.steps import Batch, Layer

logger = logging.getLogger(__name__)


def warm_up(paths: Paths, anchor: int, dtype: torch.dtype, *, fp8: bool) -> None:
    """Run one anchor's prefill step at the end of the context, for nothing but its compilation.

    dtype: of queries. fp8: whether the pool holds keys in 8 bits.
    Raises KascadeError where a kernel does not fit the GPU.
    All positions are the padding's slot 0, whose 8-bit copy is the only thing written.
    """
    sizes, started, layer = paths.sizes, time.monotonic(), Layer(anchor, 1.0, 1.0 if fp8 else None)
    keys, _ = paths.kv.of(anchor)
    first = torch.zeros(1, dtype=torch.int64, device=keys.device)
    begin = max(0, sizes.context - TILE - 1)
    batch = Batch(
        decode=False,
        requests=first,
        ends=first + sizes.context,
        written=first,
        ends_cpu=np.array([sizes.context]),
        prefixes_cpu=[begin],
    )
    shape = (sizes.context - begin, sizes.q_heads, sizes.head_dim)
    q = torch.zeros(shape, dtype=dtype, device=keys.device)
    head_map = torch.zeros(sizes.kv_heads, dtype=torch.int32, device=keys.device)
    try:
        paths.kv.copy(anchor, batch.written)
        step = paths.extend.record(batch)
        selected = paths.extend.select(step, q, layer)
        paths.extend.attend(step, q, layer, selected, head_map)
    except OutOfResources as error:
        raise KascadeError(
            f"model: expected {sizes.group} query heads a KV head of {sizes.head_dim} dimensions "
            f"to fit this GPU, got {error}; drop --kascade-exact where it is set, or serve with "
            "another --attention-backend"
        ) from error
    logger.info("kascade: prefill kernels were ready after %.1f s", time.monotonic() - started)


def warm_up_decode(
    paths: Paths, anchor: int, captured: int, eager: int, dtype: torch.dtype, *, fp8: bool
) -> None:
    """Run decode steps of more than ``captured`` and up to ``eager`` requests, one of each kind.

    Smaller ones are compiled when their graphs are captured. All requests have one key, in the
    padding's slot 0, whose 8-bit copy is the only thing of the pool that is written. dtype, fp8:
    as above.
    """
    sizes, started, decode = paths.sizes, time.monotonic(), paths.decode
    layer = Layer(anchor, 1.0, 1.0 if fp8 else None)
    keys, _ = paths.kv.of(anchor)
    head_map = torch.zeros(sizes.kv_heads, dtype=torch.int32, device=keys.device)
    # The largest first: buffers for it serve the others, and requests.
    for count in sorted(decode.sizes_apart(captured + 1, eager), reverse=True):
        first = torch.zeros(count, dtype=torch.int64, device=keys.device)
        batch = Batch(decode=True, requests=first, ends=first + 1, written=first)
        q = torch.zeros(count, sizes.q_heads, sizes.head_dim, dtype=dtype, device=keys.device)
        paths.kv.copy(anchor, batch.written)
        decode.prepare(batch)
        step = decode.record(batch)
        decode.select(step, q, layer, torch.empty_like(q))
        selected = decode.select(step, q, layer)
        decode.attend(step, q, layer, selected, head_map)
    waited = time.monotonic() - started
    logger.info("kascade: kernels of eager decode steps were ready after %.1f s", waited)
