"""Scores of every key before a query tile: log-sum-exps, then post-softmax mass as codes.

A tile's query rows of one KV head are numbered query-major: row ``r`` is query ``r // group`` and
query head ``head * group + r % group``. So ``lse`` is [rows, H, 32 * group], and a partial tile
uses the first ``count * group`` of them.
"""

from __future__ import annotations

import torch
import triton

from kascade_kernels import tuning
from kascade_kernels._triton._tile_scores import (
    block_count,
    merge_lse_kernel,
    tile_lse_kernel,
    tile_scores_kernel,
)
from kascade_kernels.budget import TILE
from kascade_kernels.checks import (
    require_contiguous,
    require_dtype,
    require_last_dim_contiguous,
    require_lists,
    require_shape,
)
from kascade_kernels.launch import EDGE, LOG2_E, PRODUCT_ROWS
from kascade_kernels.structs import KeyCopy, Lists, Rows


def bundle(group: int) -> int:
    """Tiles that share each load of keys: as many as fill one product."""
    return max(1, PRODUCT_ROWS // (TILE * triton.next_power_of_2(group)))


def keys_read(candidates: int, stride: int) -> int:
    """Candidates that a log-sum-exp with this stride reads."""
    middle = max(candidates - 2 * EDGE, 0)
    return candidates - middle + triton.cdiv(middle, stride)


def tile_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: Rows,
    lists: Lists,
    scale: float,
    *,
    stride: int = 1,
    max_end: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-sum-exp of every query row over all keys that it sees, in base 2.

    q: [tokens, Hq, D]. k_cache: [slots, H, D]. req_to_token: int32 [requests, max context].
    stride: 1 is exact. A larger one reads the first and last 128 candidates and the own tile in
        full and every stride-th key between, each for all that were left out: an estimate that is
        a function of the tile alone.
    lists: their counts say which need scores: those that hold all candidates get none.
    max_end: bound on ``rows.ends`` known to the host; it only saves empty programs.
    Returns float32 [rows, H, 32 * group] of logits * scale * log2(e), +inf where a partial tile
    has no query. Heads whose list holds all candidates are not written.
    Not checked: that slots, requests and tokens lie within their tensors.
    """
    count, kv_heads, group = check_tiles(q, k_cache, req_to_token, rows)
    require_lists(lists, count, (1, kv_heads))
    shape = (count, kv_heads, TILE * group)
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=q.device)
    _require_lse("out", out, shape)
    max_end = req_to_token.shape[1] if max_end is None else max_end
    launch = tuning.launch("tile_lse", q.device, q.shape[-1] * q.element_size(), group)
    spans = max(1, triton.cdiv(keys_read(max_end, stride), launch.span))
    parts = torch.empty(count, kv_heads, spans, TILE * group, dtype=torch.float32, device=q.device)
    common = {
        "end_ptr": rows.ends,
        "count_ptr": rows.tokens,
        "selected_ptr": lists.counts,
        "part_ptr": parts,
        "spans": spans,
        "HEADS": kv_heads,
        "LISTS": lists.per_row,
        "GROUP": group,
        "STRIDE": stride,
        "SPAN": launch.span,
    }
    tile_lse_kernel[(count, kv_heads * block_count(group), spans)](
        q_ptr=q,
        k_ptr=k_cache,
        table_ptr=req_to_token,
        request_ptr=rows.requests,
        start_ptr=rows.starts,
        scale=scale * LOG2_E,
        q_token_stride=q.stride(0),
        q_head_stride=q.stride(1),
        k_slot_stride=k_cache.stride(0),
        k_head_stride=k_cache.stride(1),
        table_stride=req_to_token.stride(0),
        DIM=q.shape[-1],
        BLOCK_K=launch.block,
        **common,
        **launch.options(),
    )
    merge = tuning.launch("merge_lse", q.device)
    merge_lse_kernel[(count, kv_heads)](lse_ptr=out, **common, **merge.options())
    return out


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

    q: [tokens, Hq, D]. keys: [slots, H, D], or their 8-bit copy; then q is rounded to 8 bits too.
    lse: float32 [rows, H, 32 * group], from ``tile_lse``.
    out: uint16 [rows, H, keys], or [rows, 1, keys] where ``pooled``, summed over KV heads.
        out[r, h, j] = encode_score(sum over queries and group of exp2(logit - lse)), j a
        candidate. Not written: entries from the own tile on, and lists that hold all candidates.
    sums: float32 [rows, keys], scratch for ``pooled``; allocated where None.
    """
    eight_bit = isinstance(keys, KeyCopy)
    cache = keys.values if eight_bit else keys
    count, kv_heads, group = check_tiles(q, cache, req_to_token, rows, eight_bit)
    _require_lse("lse", lse, (count, kv_heads, TILE * group))
    per_row = 1 if pooled else kv_heads
    _require_rows("out", out, (count, per_row, None), torch.uint16)
    require_lists(lists, count, (per_row,))
    pooled, room = pooled and kv_heads > 1, out.shape[2]
    if sums is None:
        sums = torch.empty(count, room if pooled else 0, dtype=torch.float32, device=q.device)
    elif pooled:
        _require_rows("sums", sums, (count, room), torch.float32)
    key_scales = keys.scales if eight_bit else lse
    key_bytes, kind = q.shape[-1] * cache.element_size(), ".8bit" if eight_bit else ""
    launch, tiles = tuning.launch(f"tile_scores{kind}", q.device, key_bytes, group), bundle(group)
    grid = (
        triton.cdiv(count, tiles),
        1 if pooled else kv_heads,
        triton.cdiv(room, launch.span),
    )
    tile_scores_kernel[grid](
        q_ptr=q,
        k_ptr=cache,
        k_scale_ptr=key_scales,
        table_ptr=req_to_token,
        request_ptr=rows.requests,
        end_ptr=rows.ends,
        start_ptr=rows.starts,
        count_ptr=rows.tokens,
        selected_ptr=lists.counts,
        lse_ptr=lse,
        sum_ptr=sums,
        code_ptr=out,
        scale=scale * LOG2_E,
        rows=count,
        q_token_stride=q.stride(0),
        q_head_stride=q.stride(1),
        k_slot_stride=cache.stride(0),
        k_head_stride=cache.stride(1),
        k_scale_slot_stride=key_scales.stride(0),
        k_scale_head_stride=key_scales.stride(1),
        table_stride=req_to_token.stride(0),
        sum_row_stride=sums.stride(0),
        code_row_stride=out.stride(0),
        code_head_stride=out.stride(1),
        HEADS=kv_heads,
        LISTS=lists.per_row,
        GROUP=group,
        DIM=q.shape[-1],
        SPAN=launch.span,
        BLOCK_K=launch.block,
        TILES=tiles,
        POOLED=pooled,
        EIGHT_BIT=eight_bit,
        **launch.options(),
    )
    return out


def check_tiles(
    q: torch.Tensor,
    keys: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: Rows,
    eight_bit: bool = False,
) -> tuple[int, int, int]:
    """Check what every operation on tiles takes; return rows, KV heads and group."""
    require_shape("q", q, (None, None, None))
    q_heads, dim = q.shape[1:]
    require_shape("keys", keys, (None, None, dim))
    require_dtype("keys", keys, torch.int8 if eight_bit else q.dtype)
    require_dtype("req_to_token", req_to_token, torch.int32)
    for name, tensor in (("q", q), ("keys", keys), ("req_to_token", req_to_token)):
        require_last_dim_contiguous(name, tensor)
    kv_heads = keys.shape[1]
    if q_heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads, got {q_heads}")
    least = 32 if eight_bit else 16
    if dim & (dim - 1) or dim < least:
        raise ValueError(f"q: expected a power of two from {least} on as head dimension, got {dim}")
    if rows.starts is None or rows.tokens is None:
        raise ValueError("rows: expected starts and tokens, got None")
    count = rows.ends.shape[0]
    for name, tensor in zip(Rows._fields, rows, strict=True):
        require_shape(f"rows.{name}", tensor, (count,))
    return count, kv_heads, q_heads // kv_heads


def _require_lse(name: str, lse: torch.Tensor, shape: tuple[int, int, int]) -> None:
    require_shape(name, lse, shape)
    require_dtype(name, lse, torch.float32)
    require_contiguous(name, lse)


def _require_rows(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    require_shape(name, tensor, shape)
    require_dtype(name, tensor, dtype)
    require_last_dim_contiguous(name, tensor)
