"""Compile the kernels of a prefill step before a request waits for them."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from triton.runtime.errors import OutOfResources

from kascade_kernels.budget import TILE
from kascade_sglang.compat import key_value_caches
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError

if TYPE_CHECKING:
    from kascade_sglang.backend.paths import Paths
    from kascade_sglang.compat import ModelRunner

logger = logging.getLogger(__name__)


def warm_up(paths: Paths, runner: ModelRunner, config: KascadeConfig) -> None:
    """Run one anchor's prefill step at the end of the context, for nothing but its compilation.

    Raises KascadeError where a kernel does not fit the GPU.
    All positions are the padding's slot 0, whose 8-bit copy is the only thing written. Decode
    kernels are compiled when graphs are captured.
    """
    shape = paths.shape
    anchors = [layer for layer in config.plan.anchors if layer in shape.layers]
    if not anchors:
        return
    started = time.monotonic()
    layer = SimpleNamespace(layer_id=anchors[0], scaling=1.0)
    keys, _ = key_value_caches(runner.token_to_kv_pool, layer.layer_id)
    slot = torch.zeros(1, dtype=torch.int64, device=shape.device)
    span = (max(0, shape.context - TILE - 1), shape.context)
    size = (span[1] - span[0], shape.q_heads, shape.head_dim)
    q = torch.zeros(size, dtype=keys.dtype, device=shape.device)
    try:
        paths.copies.write(layer.layer_id, keys, slot)
        paths.extend.begin_spans([span], slot)
        paths.extend.select(q, layer)
        paths.extend.attend(q, layer)
    except OutOfResources as error:
        raise KascadeError(
            f"model: expected {shape.q_heads // shape.kv_heads} query heads a KV head of "
            f"{shape.head_dim} dimensions to fit this GPU, got {error}; drop --kascade-exact where "
            "it is set, or serve with another --attention-backend"
        ) from error
    paths.store.clear()
    logger.info("kascade: prefill kernels were ready after %.1f s", time.monotonic() - started)
