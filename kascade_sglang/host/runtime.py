"""SGLang's internals that a worker touches: model runner, KV pool, layers, dense backends."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from kascade_sglang.errors import KascadeError
from kascade_sglang.host.dense import FP8_TYPES, SCALING, default_dense_backend

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

LARGE_KEY_BIAS = 32.0
"""Of which fp8 keeps 3 bits, or 2: keys are then known to the nearest 2, or 4."""

__all__ = [
    "AttentionBackend",
    "Backend",
    "ForwardBatch",
    "MHATokenToKVPool",
    "ModelRunner",
    "RadixAttention",
    "build_dense_backend",
    "key_value_caches",
    "key_value_scales",
    "local_kv_heads",
    "local_layers",
    "model_dtype",
    "releasable",
    "require_layers",
    "require_plain_pool",
    "require_runner",
    "require_scales",
    "sinks_of",
    "write_kv",
]


class Backend(AttentionBackend):
    """SGLang's base class, with what SGLang reads off a backend."""

    def __init__(self, runner: "ModelRunner") -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.max_context_len = runner.model_config.context_len


def _tensor_parallel_rank(runner: "ModelRunner") -> int:
    if hasattr(runner, "ps"):
        return runner.ps.tp_rank
    # From SGLang 0.5.21 on.
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_rank


def local_kv_heads(runner: "ModelRunner") -> range:
    """Return the model's KV heads that this rank holds."""
    count = runner.model_config.get_num_kv_heads(runner.server_args.tp_size)
    first = _tensor_parallel_rank(runner) * count
    return range(first, first + count)


def local_layers(runner: "ModelRunner") -> range:
    """Return the model's layers that this rank holds."""
    pool = runner.token_to_kv_pool
    return range(pool.start_layer, pool.start_layer + pool.layer_num)


def build_dense_backend(runner: "ModelRunner", name: str | None) -> AttentionBackend:
    """Build the in-tree backend that computes whatever is not sparse; None: by hardware."""
    return ATTENTION_BACKENDS[name or default_dense_backend()](runner)


def _pool_of_full_layers(pool: Any) -> Any:
    """Return the pool, or that part of it which layers without a window have: same slots."""
    return pool.full_kv_pool if type(pool) is SWAKVPool else pool


def require_plain_pool(pool: Any, dtype: torch.dtype) -> None:
    """Raise KascadeError unless the KV pool holds ``[slots, KV heads, head dim]`` of ``dtype``.

    Where layers with a window have a pool of their own, that of the others must.
    """
    pool = _pool_of_full_layers(pool)
    if type(pool) is not MHATokenToKVPool:
        raise KascadeError(
            f"KV pool: expected SGLang's MHATokenToKVPool, got {type(pool).__name__}; "
            "serve this model with another attention backend"
        )
    if pool.post_capture_active:
        raise KascadeError(
            "KV cache: expected its final size before graphs are captured, got a later one; unset "
            "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
        )
    keys = pool.get_key_buffer(pool.start_layer)
    if keys.dtype != dtype:
        raise KascadeError(
            f"KV cache: expected {dtype}, got {keys.dtype}; set --kv-cache-dtype to the model's "
            "type or to fp8_e4m3, or serve a checkpoint without a quantised KV cache"
        )
    slots = pool.size + pool.page_size
    if keys.dim() != 3 or keys.shape[0] != slots:
        raise KascadeError(
            f"KV cache: expected [{slots}, KV heads, head dim], got {list(keys.shape)}; unset "
            "SGLANG_USE_HND_KVCACHE"
        )


def _require_layer(layer: RadixAttention, window: int) -> None:
    """Raise KascadeError unless a layer is causal self-attention with such a window.

    window: positions that a query sees, its own included; 0 where it sees all before it.
    """
    # SGLang counts the positions before the query's own, and has -1 where there is no window.
    found = layer.sliding_window_size + 1
    if layer.attn_type != AttentionType.DECODER or layer.is_cross_attention or layer.logit_cap:
        raise KascadeError(
            f"layer {layer.layer_id}: expected causal self-attention without a cap on its logits, "
            "got another kind; serve with another --attention-backend"
        )
    if found != window:
        raise KascadeError(
            f"layer {layer.layer_id}: expected a sliding window of {window} positions by the "
            f"model's config (0: none), got {found}; serve with another --attention-backend"
        )


def require_layers(model: torch.nn.Module, window_of: Callable[[int], int]) -> None:
    """Raise KascadeError unless each layer of a loaded model is causal and has its window.

    Once, as the server starts: the backend asks no layer again.
    """
    for layer in model.modules():
        if isinstance(layer, RadixAttention):
            _require_layer(layer, window_of(layer.layer_id))


def model_dtype(runner: "ModelRunner") -> torch.dtype:
    """Return the type of the model's queries."""
    return runner.model_config.dtype


def sinks_of(runner: "ModelRunner") -> torch.Tensor | None:
    """Return the sinks of one of the loaded model's layers, [Hq]; None where layers have none."""
    weights = runner.model.named_parameters()
    return next((weight for name, weight in weights if name.endswith(".sinks")), None)


def key_value_scales(layer: RadixAttention) -> tuple[float, float]:
    """Return a layer's k_scale and v_scale: what is stored in fp8 times these is K and V."""
    scales = (layer.k_scale_float, layer.v_scale_float)
    return tuple(1.0 if scale is None else scale for scale in scales)


def require_scales(model: torch.nn.Module, dense_backend: str | None) -> None:
    """Raise KascadeError where a layer's scales are such as the dense backend does not apply."""
    name = dense_backend or default_dense_backend()
    for layer in () if name in SCALING else model.modules():
        if isinstance(layer, RadixAttention) and key_value_scales(layer) != (1.0, 1.0):
            raise KascadeError(
                f"layer {layer.layer_id}: expected no k_scale and v_scale of its own, which the "
                f"dense backend {name} does not apply, got {key_value_scales(layer)}; add "
                "--kascade-dense-backend triton, or set --kv-cache-dtype to the model's type"
            )


def largest_key_bias(model: torch.nn.Module) -> float:
    """Largest bias that a layer of the loaded model adds to its keys, before rotation; 0 without.

    As Qwen 2 has them. Layers that make queries, keys and values in several products are not known.
    """
    largest = 0.0
    for module in model.modules():
        if isinstance(module, QKVParallelLinear) and module.bias is not None:
            queries, keys = module.num_heads * module.head_size, module.num_kv_heads
            bias = module.bias.detach()[queries : queries + keys * module.head_size]
            largest = max(largest, float(bias.abs().max()))
    return largest


def warn_of_key_bias(largest: float, kv_cache_dtype: str) -> None:
    """Say that a model's keys do not bear fp8; largest: the largest bias that it adds to them."""
    if largest >= LARGE_KEY_BIAS:
        logger.warning(
            "kascade: --kv-cache-dtype %s: this model adds up to %.0f to its keys, of which fp8 "
            "keeps the leading bits alone; answers can be lost, with any backend: compare with "
            "kascade eval, or drop the flag",
            kv_cache_dtype,
            largest,
        )


def require_runner(
    runner: "ModelRunner",
    window_of: Callable[[int], int],
    kv_cache_dtype: str,
    dense_backend: str | None,
) -> None:
    """Raise KascadeError unless the loaded model and its KV pool are what arguments promised.

    window_of: see ``require_layers``. kv_cache_dtype: one of FP8_TYPES, or ``auto``.
    """
    require_layers(runner.model, window_of)
    stored = FP8_TYPES.get(kv_cache_dtype, model_dtype(runner))
    require_plain_pool(runner.token_to_kv_pool, stored)
    if kv_cache_dtype in FP8_TYPES:
        require_scales(runner.model, dense_backend)
        warn_of_key_bias(largest_key_bias(runner.model), kv_cache_dtype)


def releasable(pool: Any) -> AbstractContextManager[Any]:
    """Return a block whose tensors' memory goes and comes back with the KV pool's.

    Under ``--enable-memory-saver``, by ``/release_memory_occupation``; else it does nothing. What
    the tensors hold is lost as the pool's keys are.
    """
    adapter = _pool_of_full_layers(pool).memory_saver_adapter
    return adapter.region(GPU_MEMORY_TYPE_KV_CACHE)


def key_value_caches(pool: Any, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's K and V, [slots, KV heads, head dim]; waits for loads in flight."""
    return pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id)


def write_kv(
    pool: Any,
    layer: RadixAttention,
    batch: "ForwardBatch",
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Store this step's keys and values in the slots the scheduler gave them.

    Where the pool is in fp8 and the layer has scales, k and v are divided by them in place.
    """
    where = KVWriteLoc(batch.out_cache_loc, None)
    pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
