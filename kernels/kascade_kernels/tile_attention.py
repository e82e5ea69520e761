"""Attention of query tiles to selected keys and, causally, to the tile itself."""

from __future__ import annotations

import torch

from kascade_kernels import tuning
from kascade_kernels._triton._tile_attention import tile_attention_kernel
from kascade_kernels._triton._tiles import block_count
from kascade_kernels.checks import (
    check_tiles,
    require_dtype,
    require_last_dim_contiguous,
    require_lists,
    require_shape,
    require_sinks,
)
from kascade_kernels.launch import LOG2_E
from kascade_kernels.structs import Lists, Rows


def tile_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: Rows,
    lists: Lists,
    head_map: torch.Tensor,
    scale: float,
    *,
    v_scale: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every row to its selected slots and, causally, to its own tile.

    q: [tokens, Hq, D]. k_cache, v_cache: [slots, H, D], in q's type or in fp8.
    req_to_token: int32 [requests, max context].
    lists: KV head h attends to list ``head_map[h]``, which holds no key of the own tile.
    head_map: int32 [H], entries below ``lists.per_row``.
    scale: a logit is q.k * scale; where keys have a scale of their own, it is a part of this one.
    v_scale: that of the values, where they have one.
    sinks: [Hq], where heads have them: logits of one more key without a value.
    out: like q; queries that no row holds are left as they are.
    Accumulates in float32, own tile first, then the list in its order: a row's result depends
    neither on the rest of the batch nor on where its keys lie.
    Not checked: that slots, requests, tokens and the head map's entries lie within their tensors.
    """
    count, kv_heads, group = check_tiles(q, k_cache, req_to_token, rows)
    require_shape("v_cache", v_cache, tuple(k_cache.shape))
    require_dtype("v_cache", v_cache, k_cache.dtype)
    require_last_dim_contiguous("v_cache", v_cache)
    require_lists(lists, count, (1, kv_heads))
    require_shape("head_map", head_map, (kv_heads,))
    require_dtype("head_map", head_map, torch.int32)
    require_sinks(sinks, kv_heads * group)
    if scale <= 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if out is None:
        out = torch.empty_like(q)
    require_shape("out", out, tuple(q.shape))
    require_last_dim_contiguous("out", out)
    key_bytes = q.shape[-1] * q.element_size()
    launch = tuning.launch("tile_attention", q.device, key_bytes, group)
    tile_attention_kernel[(kv_heads * block_count(group), count)](
        q=q,
        k=k_cache,
        v=v_cache,
        table=req_to_token,
        requests=rows.requests,
        ends=rows.ends,
        starts=rows.starts,
        tokens=rows.tokens,
        slots=lists.slots,
        offsets=lists.offsets,
        counts=lists.counts,
        head_map=head_map,
        sinks=sinks,
        out=out,
        v_scale=v_scale,
        scale_log2=scale * LOG2_E,
        stride_q=q.stride(0),
        stride_q_head=q.stride(1),
        stride_k=k_cache.stride(0),
        stride_k_head=k_cache.stride(1),
        stride_v=v_cache.stride(0),
        stride_v_head=v_cache.stride(1),
        stride_table=req_to_token.stride(0),
        stride_out=out.stride(0),
        stride_out_head=out.stride(1),
        LISTS=lists.per_row,
        GROUP=group,
        D=q.shape[-1],
        BLOCK=launch.block,
        **launch.options(),
    )
    return out
