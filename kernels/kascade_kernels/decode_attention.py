"""Attention of one new query a request to the keys on its anchor's list."""

import torch

from kascade_kernels._triton._decode_attention import decode_attention_kernel
from kascade_kernels.checks import (
    require_dtype,
    require_heads_together,
    require_same_stride,
    require_shape,
)
from kascade_kernels.decode_spans import STEP, Spans
from kascade_kernels.launch import LOG2_E, padded_group
from kascade_kernels.merge_parts import Parts, merge_parts
from kascade_kernels.structs import Selection

LAUNCH = {"num_warps": 4, "num_stages": 4}


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    selection: Selection,
    spans: Spans,
    head_map: torch.Tensor,
    scale: float,
    parts: Parts,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend every row to the list of each KV head's anchor head.

    q: [rows, Hq, D]. k_cache, v_cache: [slots, H, D]; keys are gathered straight from the pool.
    selection: lists that include the query's own tile, so every key on them is visible.
    head_map: int32 [H], which of the selection's lists a KV head reads.
    Returns [rows, Hq, D]. Not checked: that slots and head map are within range.
    """
    count, q_heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_heads_together(name, tensor)
    require_shape("k_cache", k_cache, (None, kv_heads, dim))
    require_shape("v_cache", v_cache, (None, kv_heads, dim))
    require_same_stride("v_cache", v_cache, k_cache)
    require_dtype("head_map", head_map, torch.int32)
    splits = spans.attend_splits
    group = q_heads // kv_heads
    decode_attention_kernel[(kv_heads, count, splits)](
        q,
        k_cache,
        v_cache,
        selection.slots,
        selection.offsets,
        selection.counts,
        spans.attend,
        head_map,
        parts.lse,
        parts.out,
        scale * LOG2_E,
        q.stride(0),
        k_cache.stride(0),
        HEADS=kv_heads,
        GROUP=group,
        GROUP_PAD=padded_group(group),
        D=dim,
        BLOCK=STEP,
        SPLITS=splits,
        **LAUNCH,
    )
    out = torch.empty_like(q) if out is None else out
    return merge_parts(parts, splits, selection.counts, spans.attend, out)
