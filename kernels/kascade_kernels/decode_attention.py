"""Attention of one new query a request to the keys on its anchor's list."""

import torch

from kascade_kernels import tuning
from kascade_kernels._triton._decode_attention import decode_attention_kernel
from kascade_kernels.checks import (
    require_dtype,
    require_heads_together,
    require_lists,
    require_same_stride,
    require_shape,
)
from kascade_kernels.decode_lists import Spans
from kascade_kernels.launch import LOG2_E, padded_group
from kascade_kernels.merge_parts import Parts, merge_parts
from kascade_kernels.structs import Lists


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lists: Lists,
    spans: Spans,
    head_map: torch.Tensor,
    scale: float,
    parts: Parts,
    out: torch.Tensor | None = None,
    v_scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend every row to the list of each KV head's anchor head.

    q: [rows, Hq, D]. k_cache, v_cache: [slots, H, D], in q's type or in fp8; keys are gathered
        straight from the pool.
    lists: with the query's own tile, so every key on them is visible.
    spans: with room for each list: it holds ``STEP * spans.attend * spans.attend_splits`` keys of
        its row at most, as the spans that ``decode_lists`` makes allow for its lengths.
    head_map: int32 [H], which of a row's lists a KV head reads.
    scale: a logit is q.k * scale; where keys have a scale of their own, it is a part of this one.
    v_scale: that of the values, where they have one.
    sinks: [Hq], where heads have them: logits of one more key without a value.
    Returns [rows, Hq, D]. Not checked: that slots and head map are within range, that spans have
        room.
    """
    count, q_heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_heads_together(name, tensor)
    require_shape("k_cache", k_cache, (None, kv_heads, dim))
    require_shape("v_cache", v_cache, (None, kv_heads, dim))
    require_same_stride("v_cache", v_cache, k_cache)
    require_dtype("head_map", head_map, torch.int32)
    require_shape("head_map", head_map, (kv_heads,))
    require_lists(lists, count, (1, kv_heads))
    splits = spans.attend_splits
    group = q_heads // kv_heads
    kind = ".fp8" if k_cache.dtype.itemsize == 1 else ""
    decode_attention_kernel[(kv_heads, count, splits)](
        q=q,
        k=k_cache,
        v=v_cache,
        slots=lists.slots,
        offsets=lists.offsets,
        counts=lists.counts,
        spans=spans.attend,
        head_map=head_map,
        part_lse=parts.lse,
        part_out=parts.out,
        scale_log2=scale * LOG2_E,
        stride_q=q.stride(0),
        stride_k=k_cache.stride(0),
        HEADS=kv_heads,
        LISTS=lists.per_row,
        GROUP=group,
        GROUP_PAD=padded_group(group),
        D=dim,
        BLOCK=tuning.STEP,
        SPLITS=splits,
        **tuning.launch(f"decode_attention{kind}", q.device).options(),
    )
    out = torch.empty_like(q) if out is None else out
    return merge_parts(parts, splits, lists.counts, spans.attend, out, head_map, v_scale, sinks)
