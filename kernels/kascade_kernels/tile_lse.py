"""Log-sum-exps of a query tile's rows over every key that they see.

A tile's query rows of one KV head are numbered query-major: row ``r`` is query ``r // group`` and
query head ``head * group + r % group``. So ``lse`` is [rows, H, 32 * group], and a partial tile
uses the first ``count * group`` of them.
"""

from __future__ import annotations

import torch
import triton

from kascade_kernels import tuning
from kascade_kernels._triton._tile_lse import merge_lse_kernel, tile_lse_kernel
from kascade_kernels._triton._tiles import block_count
from kascade_kernels.budget import TILE
from kascade_kernels.checks import check_tiles, require_lists, require_lse, require_sinks
from kascade_kernels.launch import EDGE, LOG2_E
from kascade_kernels.structs import Lists, Rows


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
    sinks: torch.Tensor | None = None,
    stride: int = 1,
    max_end: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-sum-exp of every query row over all keys that it sees and its sink, in base 2.

    q: [tokens, Hq, D]. k_cache: [slots, H, D], in q's type or in fp8.
    req_to_token: int32 [requests, max context].
    scale: a logit is q.k * scale; where keys have a scale of their own, it is a part of this one.
    sinks: [Hq], where heads have them: logits of one more key.
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
    require_sinks(sinks, kv_heads * group)
    shape = (count, kv_heads, TILE * group)
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=q.device)
    require_lse("out", out, shape)
    max_end = req_to_token.shape[1] if max_end is None else max_end
    launch = tuning.launch("tile_lse", q.device, q.shape[-1] * q.element_size(), group)
    spans = max(1, triton.cdiv(keys_read(max_end, stride), launch.span))
    parts = torch.empty(count, kv_heads, spans, TILE * group, dtype=torch.float32, device=q.device)
    common = {
        "ends": rows.ends,
        "tokens": rows.tokens,
        "counts": lists.counts,
        "part_lse": parts,
        "room": spans,
        "HEADS": kv_heads,
        "LISTS": lists.per_row,
        "GROUP": group,
        "STRIDE": stride,
        "SPAN": launch.span,
    }
    tile_lse_kernel[(count, kv_heads * block_count(group), spans)](
        q=q,
        k=k_cache,
        table=req_to_token,
        requests=rows.requests,
        starts=rows.starts,
        scale_log2=scale * LOG2_E,
        stride_q=q.stride(0),
        stride_q_head=q.stride(1),
        stride_k=k_cache.stride(0),
        stride_k_head=k_cache.stride(1),
        stride_table=req_to_token.stride(0),
        D=q.shape[-1],
        BLOCK=launch.block,
        **common,
        **launch.options(),
    )
    merge = tuning.launch("merge_lse", q.device)
    merge_lse_kernel[(count, kv_heads)](sinks=sinks, lse=out, **common, **merge.options())
    return out
