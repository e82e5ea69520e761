"""Compile the kernels of prefill and of eager decode steps before a request waits for them."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from kascade_kernels.budget import TILE
from kascade_sglang.backend.paths import KernelPaths
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.steps import Batch, Layer

logger = logging.getLogger(__name__)


def warm_up(paths: KernelPaths, layer: Layer, dtype: torch.dtype) -> None:
    """Run an anchor's prefill step at the end of the context, for nothing but its compilation.

    layer: an anchor, with all that the model's have: scales, sinks. dtype: of queries.
    Raises KascadeError where a kernel does not fit the GPU.
    All positions are the padding's slot 0, whose 8-bit copy is the only thing written.
    """
    sizes, started = paths.sizes, time.monotonic()
    keys, _ = paths.kv.of(layer.index)
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
        paths.kv.copy(layer.index, batch.written)
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
    paths: KernelPaths, anchors: list[Layer], captured: int, eager: int, dtype: torch.dtype
) -> None:
    """Run decode steps of more than ``captured`` and up to ``eager`` requests, one of each kind.

    Smaller ones are compiled when their graphs are captured. All keys of all requests are in the
    padding's slot 0, whose 8-bit copy is the only thing of the pool that is written. anchors: of
    all kinds that the rank has, a pooled one's maker before it. dtype: as above.
    """
    sizes, started, decode = paths.sizes, time.monotonic(), paths.decode
    keys, _ = paths.kv.of(anchors[0].index)
    # The largest first: buffers for it serve the others, and requests.
    for count in sorted(decode.sizes_apart(captured + 1, eager), reverse=True):
        first = torch.zeros(count, dtype=torch.int64, device=keys.device)
        chain = sizes.chain
        batch = Batch(decode=True, requests=first, ends=first + chain, written=first, chain=chain)
        shape = (count * chain, sizes.q_heads, sizes.head_dim)
        q = torch.zeros(shape, dtype=dtype, device=keys.device)
        paths.store.clear()
        decode.prepare(batch)
        step = decode.record(batch)
        decode.select(step, q, anchors[0], torch.empty_like(q))
        for layer in anchors:
            paths.kv.copy(layer.index, batch.written)
            selected = decode.select(step, q, layer, store=paths.store)
            paths.store.put(layer.index, selected)
        decode.attend(step, q, layer, *paths.store.get(layer.index))
    waited = time.monotonic() - started
    logger.info("kascade: kernels of eager decode steps were ready after %.1f s", waited)
