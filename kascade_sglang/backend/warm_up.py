"""Compile the kernels of a prefill step before a request waits for them."""

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
    All positions are the padding's slot 0, whose 8-bit copy is the only thing written. Decode
    kernels are compiled when graphs are captured.
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
