"""SGLang's internals that the backend uses, for the one release it is verified against.

Only this module and ``patches/`` import SGLang, so a new release is met in two places.
"""

from typing import TYPE_CHECKING, Any

import sglang
import torch
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.layers.attention.attention_registry import (
    ATTENTION_BACKENDS,
    register_attention_backend,
)
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import (
    ATTENTION_BACKEND_CHOICES,
    add_attention_backend_choices,
    add_deterministic_attention_backend_choices,
    add_radix_supported_deterministic_attention_backend_choices,
)

from kascade_sglang.backend.dense import default_dense_backend
from kascade_sglang.errors import KascadeError
from kascade_sglang.plan.schema import ModelShape

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

__all__ = [
    "AttentionBackend",
    "ForwardBatch",
    "ModelRunner",
    "RadixAttention",
    "build_dense_backend",
    "has_gpu",
    "is_plain_decoder_layer",
    "key_value_caches",
    "largest_decodes",
    "local_kv_heads",
    "local_layers",
    "model_shape",
    "phases_on_kascade",
    "register_backend",
    "require_hooks",
    "require_plain_pool",
    "require_supported_host",
    "stage_starts",
    "uses_kascade",
    "write_kv",
]

SUPPORTED_SGLANG = "0.5.17"
NAME = "kascade"


def require_supported_host(version: str = sglang.__version__) -> None:
    """Raise KascadeError unless SGLang is the release this package is verified against."""
    if version != SUPPORTED_SGLANG:
        raise KascadeError(
            f"sglang: expected {SUPPORTED_SGLANG}, got {version}; "
            f"pip install sglang=={SUPPORTED_SGLANG}"
        )


def require_hooks(targets: list[str]) -> None:
    """Raise KascadeError if SGLang logged and skipped one of our hooks."""
    missing = sorted(set(targets) - HookRegistry._patched)
    if missing:
        raise KascadeError(
            f"hooks on {', '.join(missing)} are not live; SGLang's log says why "
            "(is SGLANG_PLUGINS or SGLANG_PLATFORM set without kascade?)"
        )


def register_backend(factory: Any) -> None:
    """Make ``--attention-backend kascade`` build ``factory(model_runner)``; repeatable."""
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
        add_deterministic_attention_backend_choices([NAME])
        add_radix_supported_deterministic_attention_backend_choices([NAME])
    register_attention_backend(NAME)(factory)


def has_gpu() -> bool:
    """Whether steps can run on a GPU of this machine."""
    return torch.cuda.is_available()


def phases_on_kascade(server_args: Any) -> set[str]:
    """Return which of ``prefill`` and ``decode`` run on the kascade backend."""
    names = {
        "prefill": server_args.prefill_attention_backend,
        "decode": server_args.decode_attention_backend,
    }
    return {
        phase for phase, name in names.items() if (name or server_args.attention_backend) == NAME
    }


def largest_decodes(server_args: Any) -> tuple[int, int]:
    """Return the most requests of a captured decode step, and of an eager one if it may be larger.

    0 where there is none, or where SGLang will choose how many requests may run.
    """
    decode = server_args.cuda_graph_config.decode
    captured = 0 if decode.backend == "disabled" else max([decode.max_bs or 0, *(decode.bs or [])])
    running = server_args.max_running_requests or 0
    return captured, running if running > captured else 0


def largest_prefill(server_args: Any) -> int:
    """Return how many new tokens a prefill step may hold."""
    # Without chunks SGLang takes a prompt of any length, if it is the step's only one.
    whole = max(server_args.max_prefill_tokens, server_args.get_model_config().context_len)
    return server_args.max_prefill_buffer_tokens() or whole


def uses_kascade(server_args: Any) -> bool:
    """Whether any phase of this server runs on the kascade backend."""
    return bool(phases_on_kascade(server_args))


def model_shape(model_config: Any) -> ModelShape:
    """Return the whole model's shape (all ranks) from SGLang's ModelConfig."""
    return ModelShape(
        layers=model_config.num_hidden_layers,
        q_heads=model_config.num_attention_heads,
        kv_heads=model_config.get_total_num_kv_heads(),
        head_dim=model_config.head_dim,
        hidden=model_config.hidden_size,
    )


def stage_starts(layers: int, stages: int) -> list[int]:
    """Return the first layer of every pipeline stage."""
    return [get_pp_indices(layers, stage, stages)[0] for stage in range(stages)]


def local_kv_heads(runner: "ModelRunner") -> range:
    """Return the model's KV heads that this rank holds."""
    count = runner.model_config.get_num_kv_heads(runner.server_args.tp_size)
    first = runner.ps.tp_rank * count
    return range(first, first + count)


def local_layers(runner: "ModelRunner") -> range:
    """Return the model's layers that this rank holds."""
    pool = runner.token_to_kv_pool
    return range(pool.start_layer, pool.start_layer + pool.layer_num)


def build_dense_backend(runner: "ModelRunner", name: str | None) -> AttentionBackend:
    """Build the in-tree backend that computes whatever is not sparse; None: by hardware."""
    return ATTENTION_BACKENDS[name or default_dense_backend()](runner)


def require_plain_pool(pool: Any, dtype: torch.dtype) -> None:
    """Raise KascadeError unless the KV pool holds ``[slots, KV heads, head dim]`` of ``dtype``."""
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
            f"KV cache: expected the model's {dtype}, got {keys.dtype}; set --kv-cache-dtype to "
            "the model's, or serve a checkpoint without a quantised KV cache"
        )
    slots = pool.size + pool.page_size
    if keys.dim() != 3 or keys.shape[0] != slots:
        raise KascadeError(
            f"KV cache: expected [{slots}, KV heads, head dim], got {list(keys.shape)}; unset "
            "SGLANG_USE_HND_KVCACHE"
        )


def is_plain_decoder_layer(layer: "RadixAttention") -> bool:
    """Whether a layer is full causal self-attention, the only kind that Kascade makes sparse."""
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.sliding_window_size <= -1
        and not layer.logit_cap
    )


def key_value_caches(pool: Any, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's K and V, [slots, KV heads, head dim]; waits for loads in flight."""
    return pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id)


def write_kv(
    pool: Any,
    layer: "RadixAttention",
    batch: "ForwardBatch",
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Store this step's keys and values in the slots the scheduler gave them."""
    pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
