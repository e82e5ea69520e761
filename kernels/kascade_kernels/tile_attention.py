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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every row to its selected slots and, causally, to its own tile.

    q: [tokens, Hq, D]. k_cache, v_cache: [slots, H, D].
    req_to_token: int32 [requests, max context].
    lists: KV head h attends to list ``head_map[h]``, which holds no key of the own tile.
    head_map: int32 [H], entries below ``lists.per_row``.
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
    if scale <= 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if out is None:
        out = torch.empty_like(q)
    require_shape("out", out, tuple(q.shape))
    require_last_dim_contiguous("out", out)
    key_bytes = q.shape[-1] * q.element_size()
    launch = tuning.launch("tile_attention", q.device, key_bytes, group)
    tile_attention_kernel[(kv_heads * block_count(group), count)](
        q_ptr=q,
        k_ptr=k_cache,
        v_ptr=v_cache,
        table_ptr=req_to_token,
        request_ptr=rows.requests,
        end_ptr=rows.ends,
        start_ptr=rows.starts,
        count_ptr=rows.tokens,
        slot_ptr=lists.slots,
        offset_ptr=lists.offsets,
        selected_ptr=lists.counts,
        head_map_ptr=head_map,
        out_ptr=out,
        scale=scale * LOG2_E,
        q_token_stride=q.stride(0),
        q_head_stride=q.stride(1),
        k_slot_stride=k_cache.stride(0),
        k_head_stride=k_cache.stride(1),
        v_slot_stride=v_cache.stride(0),
        v_head_stride=v_cache.stride(1),
        table_stride=req_to_token.stride(0),
        out_token_stride=out.stride(0),
        out_head_stride=out.stride(1),
        LISTS=lists.per_row,
        GROUP=group,
        DIM=q.shape[-1],
        BLOCK_K=launch.block,
        **launch.options(),
    )
    return out
