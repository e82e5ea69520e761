"""Scores of every key for one new query a request, and attention to all of them where asked."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from kascade_kernels import tuning
from kascade_kernels._triton._decode_scores import decode_scores_kernel, pool_scores_kernel
from kascade_kernels.arena import Empty
from kascade_kernels.checks import (
    require_dtype,
    require_heads_together,
    require_lists,
    require_pool,
    require_same_stride,
    require_shape,
    require_sinks,
)
from kascade_kernels.decode_lists import Spans
from kascade_kernels.find_shared_prefixes import SharedPrefix
from kascade_kernels.launch import LOG2_E, padded_group, pool_arguments
from kascade_kernels.merge_parts import Parts, merge_parts
from kascade_kernels.select_slots import CodeBuffer, programs_per_list
from kascade_kernels.structs import KeyCopy, Lists, PoolKeys, Rows
from kascade_kernels.tuning import CHUNK, STEP


class ScoreScratch(NamedTuple):
    """Buffers of one launch, for up to ``rows`` requests of up to ``keys`` keys.

    logits: float16 [rows, Hq, keys]. block_max: float32 [rows, Hq, keys / 64].
    codes: the result, with the counts of its high bytes.
    """

    logits: torch.Tensor
    block_max: torch.Tensor
    codes: CodeBuffer

    @staticmethod
    def bytes_per_row(q_heads: int, lists: int, keys: int) -> int:
        """Bytes that each request of a launch needs."""
        keys = padded_keys(keys)
        logits = q_heads * (2 * keys + 4 * (keys // STEP))
        return logits + CodeBuffer.bytes_per_row(lists, keys)

    @staticmethod
    def allocate(rows: int, q_heads: int, lists: int, keys: int, empty: Empty) -> ScoreScratch:
        """Allocate for ``rows`` requests; lists: selections per row, the KV heads or 1."""
        keys = padded_keys(keys)
        return ScoreScratch(
            empty((rows, q_heads, keys), torch.float16),
            empty((rows, q_heads, keys // STEP), torch.float32),
            CodeBuffer.allocate(rows, lists, keys, empty),
        )


def padded_keys(keys: int) -> int:
    """Round a context length up to whole blocks."""
    return triton.cdiv(keys, STEP) * STEP


def decode_scores(
    q: torch.Tensor,
    keys: torch.Tensor | KeyCopy,
    req_to_token: torch.Tensor,
    rows: Rows,
    lists: Lists,
    spans: Spans,
    shared: SharedPrefix,
    scale: float,
    scratch: ScoreScratch,
    parts: Parts,
    values: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    v_scale: float | None = None,
    sinks: torch.Tensor | None = None,
    pool: PoolKeys | None = None,
) -> torch.Tensor | None:
    """Score all candidates of every row into ``scratch.codes``; with ``values`` also attend.

    q: [rows, Hq, D]. keys: [slots, H, D], in q's type or in fp8, or their 8-bit copy.
    shared: of these rows; what several have in common is read once.
    values: [slots, H, D]; where given, every row also attends to all its keys, and the result,
        [rows, Hq, D], goes to ``out``.
    lists: their counts say which need scores: those that hold all keys get no codes.
    scale: a logit is q.k * scale; where keys have a scale of their own, it is a part of this one.
    v_scale: that of the values, where they have one.
    sinks: [Hq], where heads have them: logits of one more key, which takes mass and is not scored.
    pool: where given, what is scored instead of the slot table; ``rows.ends`` are its counts.
    Codes order like the post-softmax mass, summed over the group (section 3.3) or, where the
    scratch has one list, over all heads. Logits are rounded to half precision, less the
    maximum of their block of 64.
    """
    eight_bit = isinstance(keys, KeyCopy)
    kind = ".8bit" if eight_bit else "" if values is None else ".attend"
    launch = tuning.launch(f"decode_scores{kind}", q.device)
    cache = keys.values if eight_bit else keys
    _check(q, cache, values, req_to_token, lists, scratch, pool)
    require_sinks(sinks, q.shape[1])
    (count, q_heads, dim), kv_heads = q.shape, cache.shape[1]
    splits, group = spans.score_splits, q_heads // kv_heads
    decode_scores_kernel[(kv_heads, count, splits)](
        q=q,
        k=cache,
        k_scales=keys.scales if eight_bit else cache,
        v=cache if values is None else values,
        table=req_to_token if pool is None else pool.lists.slots,
        requests=rows.requests,
        ends=rows.ends,
        counts=lists.counts,
        spans=spans.score,
        shared_keys=shared.keys,
        shared_rows=shared.members,
        logits=scratch.logits,
        block_max=scratch.block_max,
        part_lse=parts.lse,
        part_out=parts.out,
        scale_log2=scale * LOG2_E,
        stride_q=q.stride(0),
        stride_k=cache.stride(0),
        stride_table=req_to_token.stride(0),
        stride_logits_head=scratch.logits.shape[2],
        HEADS=kv_heads,
        LISTS=lists.per_row,
        GROUP=group,
        GROUP_PAD=padded_group(group),
        MEMBERS=shared.members.shape[1],
        D=dim,
        BLOCK=STEP,
        SPLITS=splits,
        EIGHT_BIT=eight_bit,
        ATTEND=values is not None,
        **pool_arguments(pool),
        **launch.options(),
    )
    _pool(rows, lists, scratch, parts, splits, sinks)
    if values is None:
        return None
    out = torch.empty_like(q) if out is None else out
    ends = rows.ends.unsqueeze(1)
    return merge_parts(parts, splits, ends, spans.score, out, v_scale=v_scale, sinks=sinks)


def _check(
    q: torch.Tensor,
    cache: torch.Tensor,
    values: torch.Tensor | None,
    req_to_token: torch.Tensor,
    lists: Lists,
    scratch: ScoreScratch,
    pool: PoolKeys | None,
) -> None:
    count, q_heads, dim = q.shape
    require_pool(pool, count, cache.shape[1], lists)
    require_heads_together("q", q)
    require_heads_together("keys", cache)
    require_shape("keys", cache, (None, None, dim))
    if values is not None:
        require_heads_together("values", values)
        require_same_stride("values", values, cache)
    require_dtype("req_to_token", req_to_token, torch.int32)
    require_shape("scratch.logits", scratch.logits, (None, q_heads, None))
    if count > scratch.logits.shape[0]:
        raise ValueError(f"q: expected at most {scratch.logits.shape[0]} rows, got {count}")
    require_lists(lists, count, (scratch.codes.codes.shape[1],))


def _pool(
    rows: Rows,
    lists: Lists,
    scratch: ScoreScratch,
    parts: Parts,
    splits: int,
    sinks: torch.Tensor | None,
) -> None:
    """Turn logits into codes: normalise each query head's, sum them, and count high bytes."""
    count, (_, per_row, chunks, _) = rows.ends.shape[0], scratch.codes.high.shape
    _, q_heads, stride = scratch.logits.shape
    launch = tuning.launch("pool_scores", scratch.logits.device)
    pool_scores_kernel[(programs_per_list(launch, per_row * count, chunks), per_row, count)](
        logits=scratch.logits,
        block_max=scratch.block_max,
        part_lse=parts.lse,
        ends=rows.ends,
        counts=lists.counts,
        sinks=sinks,
        codes=scratch.codes.codes,
        high_counts=scratch.codes.high,
        stride_logits_head=stride,
        LISTS=per_row,
        PER_LIST=q_heads // per_row,
        BLOCK=STEP,
        SPLITS=splits,
        CHUNKS=chunks,
        CHUNK=CHUNK,
        **launch.options(),
    )
