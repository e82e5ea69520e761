"""Scores of every key before a query tile: its post-softmax mass, as codes."""

from __future__ import annotations

import torch
import triton

from kascade_kernels import tuning
from kascade_kernels._triton._tile_scores import tile_scores_kernel
from kascade_kernels.budget import TILE
from kascade_kernels.checks import (
    check_tiles,
    require_dtype,
    require_last_dim_contiguous,
    require_lists,
    require_lse,
    require_shape,
)
from kascade_kernels.launch import LOG2_E, PRODUCT_ROWS
from kascade_kernels.structs import KeyCopy, Lists, Rows


def bundle(group: int) -> int:
    """Tiles that share each load of keys: as many as fill one product."""
    return max(1, PRODUCT_ROWS // (TILE * triton.next_power_of_2(group)))


def tile_scores(
    q: torch.Tensor,
    keys: torch.Tensor | KeyCopy,
    req_to_token: torch.Tensor,
    rows: Rows,
    lists: Lists,
    lse: torch.Tensor,
    scale: float,
    *,
    pooled: bool = False,
    out: torch.Tensor,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score all candidates of every row: codes that order like the attention mass on a key.

    q: [tokens, Hq, D]. keys: [slots, H, D], in q's type or fp8, or a copy; q is then rounded, too.
    lse: float32 [rows, H, 32 * group], from ``tile_lse``.
    out: uint16 [rows, H, keys], or [rows, 1, keys] where ``pooled``, summed over KV heads.
        out[r, h, j] = encode_score(sum over queries and group of exp2(logit - lse)), j a
        candidate. Not written: entries from the own tile on, and lists that hold all candidates.
    sums: float32 [rows, keys], scratch for ``pooled``; allocated where None.
    """
    eight_bit = isinstance(keys, KeyCopy)
    cache = keys.values if eight_bit else keys
    count, kv_heads, group = check_tiles(q, cache, req_to_token, rows, eight_bit)
    require_lse("lse", lse, (count, kv_heads, TILE * group))
    per_row = 1 if pooled else kv_heads
    _require_rows("out", out, (count, per_row, None), torch.uint16)
    require_lists(lists, count, (per_row,))
    pooled, room = pooled and kv_heads > 1, out.shape[2]
    if sums is None:
        sums = torch.empty(count, room if pooled else 0, dtype=torch.float32, device=q.device)
    elif pooled:
        _require_rows("sums", sums, (count, room), torch.float32)
    key_scales = keys.scales if eight_bit else lse
    key_bytes = q.shape[-1] * (1 if eight_bit else q.element_size())
    kind = ".8bit" if eight_bit else ""
    launch, tiles = tuning.launch(f"tile_scores{kind}", q.device, key_bytes, group), bundle(group)
    grid = (
        triton.cdiv(count, tiles),
        1 if pooled else kv_heads,
        triton.cdiv(room, launch.span),
    )
    tile_scores_kernel[grid](
        q=q,
        k=cache,
        k_scales=key_scales,
        table=req_to_token,
        requests=rows.requests,
        ends=rows.ends,
        starts=rows.starts,
        tokens=rows.tokens,
        counts=lists.counts,
        lse=lse,
        sums=sums,
        codes=out,
        scale_log2=scale * LOG2_E,
        rows=count,
        stride_q=q.stride(0),
        stride_q_head=q.stride(1),
        stride_k=cache.stride(0),
        stride_k_head=cache.stride(1),
        stride_scales=key_scales.stride(0),
        stride_scales_head=key_scales.stride(1),
        stride_table=req_to_token.stride(0),
        stride_sums=sums.stride(0),
        stride_codes=out.stride(0),
        stride_codes_list=out.stride(1),
        HEADS=kv_heads,
        LISTS=lists.per_row,
        GROUP=group,
        D=q.shape[-1],
        SPAN=launch.span,
        BLOCK=launch.block,
        TILES=tiles,
        POOLED=pooled,
        EIGHT_BIT=eight_bit,
        **launch.options(),
    )
    return out


def _require_rows(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    require_shape(name, tensor, shape)
    require_dtype(name, tensor, dtype)
    require_last_dim_contiguous(name, tensor)
