"""Other libraries' kernels for the same work, to be timed beside ours."""

import torch

from benchmarks.kernel_common import DEVICE, DIM, DTYPE, GROUP, KV_HEADS, SCALE, Pool, Step
from kascade_kernels.structs import Lists


def _fa3_pool(pool: Pool, rows: int, fp8: bool) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Keys and values as FlashAttention-3 takes them, and their scales where they are in fp8."""
    if not fp8:
        return pool.k[:, None], pool.v[:, None], {}
    ones = torch.ones(rows, KV_HEADS, device=DEVICE)
    return pool.stored_k[:, None], pool.stored_v[:, None], {"k_descale": ones, "v_descale": ones}


def fa3_decode(q: torch.Tensor, pool: Pool, lengths: torch.Tensor, fp8: bool = False) -> Step:
    """FlashAttention-3 as SGLang's fa3 backend calls it to decode; lengths: [requests].

    fp8: on what the pool stores; queries are then rounded to fp8 in the step, as SGLang does.
    """
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    table = pool.table[:, : int(lengths.max())].contiguous()
    seqlens = lengths.int()
    k, v, scales = _fa3_pool(pool, len(q), fp8)
    return lambda: flash_attn_with_kvcache(
        q.to(k.dtype)[:, None],
        k,
        v,
        cache_seqlens=seqlens,
        page_table=table,
        softmax_scale=SCALE,
        causal=True,
        **scales,
    )


def fa3_extend(
    q: torch.Tensor, pool: Pool, spans: list[tuple[int, int]], fp8: bool = False
) -> Step:
    """FlashAttention-3 as SGLang's fa3 backend calls it to prefill positions [begin, end)."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    new = torch.tensor([0, *(end - begin for begin, end in spans)])
    ends = [end for _, end in spans]
    table = pool.table[:, : max(ends)].contiguous()
    starts = new.cumsum(0).int().to(DEVICE)
    seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    most = int(new.max())
    k, v, scales = _fa3_pool(pool, len(spans), fp8)
    return lambda: flash_attn_with_kvcache(
        q.to(k.dtype),
        k,
        v,
        cache_seqlens=seqlens,
        page_table=table,
        cu_seqlens_q=starts,
        max_seqlen_q=most,
        softmax_scale=SCALE,
        causal=True,
        **scales,
    )


def flashinfer_decode(q: torch.Tensor, pool: Pool, lengths: list[int]) -> Step:
    """FlashInfer's dense decoding of what the pool stores, in pages of one token; not planning."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    rows, total = len(lengths), sum(lengths)
    tables = [row[:length] for row, length in zip(pool.table, lengths, strict=True)]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**29, dtype=torch.uint8, device=DEVICE),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty(rows + 1, dtype=torch.int32, device=DEVICE),
        paged_kv_indices_buffer=torch.empty(total, dtype=torch.int32, device=DEVICE),
        paged_kv_last_page_len_buffer=torch.empty(rows, dtype=torch.int32, device=DEVICE),
    )
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    ones = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    stored, heads = pool.stored_k.dtype, KV_HEADS * GROUP
    types = {"q_data_type": DTYPE, "kv_data_type": stored}
    wrapper.plan(starts, torch.cat(tables), ones, heads, KV_HEADS, DIM, 1, sm_scale=SCALE, **types)
    paged = (pool.stored_k[:, None], pool.stored_v[:, None])
    return lambda: wrapper.run(q, paged)


def torch_select(codes: torch.Tensor, k: int) -> Step:
    """``torch.topk`` of float32 scores, one k for all; positions, not sorted, not translated."""
    scores = codes.flatten(0, 1).float()
    return lambda: torch.topk(scores, k, sorted=False)


def flashinfer_select(
    codes: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, k: int
) -> Step:
    """FlashInfer's Top-k of bfloat16 scores, translated to slots; one k for all, not sorted."""
    from flashinfer import top_k_page_table_transform

    rows, lists, _ = codes.shape
    scores = codes.flatten(0, 1).to(DTYPE)
    keys = lengths.int().repeat_interleave(lists)
    batch = torch.arange(rows, dtype=torch.int32, device=DEVICE).repeat_interleave(lists)
    width = table[:, : scores.shape[1]].contiguous()
    return lambda: top_k_page_table_transform(scores, width, keys, k, row_to_batch=batch)


def flashinfer_attend(q: torch.Tensor, pool: Pool, lists: Lists, *, tensor_cores: bool) -> Step:
    """FlashInfer's paged decode, the pool seen as pages of one key of one KV head.

    Its plan needs every list's length on the host, so a captured graph would not fit the next
    step; planning is not timed.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    rows = len(q)
    counts, heads = lists.counts.flatten(), list(range(KV_HEADS)) * rows
    where = zip(lists.offsets.flatten().tolist(), counts.tolist(), heads, strict=True)
    pages = [lists.slots[at : at + n] * KV_HEADS + head for at, n, head in where]
    indptr = torch.tensor([0, *counts.tolist()]).cumsum(0).int().to(DEVICE)
    workspace = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    indices = torch.cat(pages).int()
    requests = rows * KV_HEADS
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=torch.empty(requests + 1, dtype=torch.int32, device=DEVICE),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty(requests, dtype=torch.int32, device=DEVICE),
    )
    ones = torch.ones(requests, dtype=torch.int32, device=DEVICE)
    types = {"q_data_type": DTYPE, "kv_data_type": pool.stored_k.dtype}
    wrapper.plan(indptr, indices, ones, GROUP, 1, DIM, 1, **types)
    queries = q.view(requests, GROUP, DIM)
    paged = tuple(cache.view(-1, 1, 1, DIM) for cache in (pool.stored_k, pool.stored_v))
    return lambda: wrapper.run(queries, paged)


def flashinfer_cascade(q: torch.Tensor, pool: Pool, lengths: list[int], shared: int) -> Step:
    """FlashInfer's dense attention that reads a prefix shared by all requests once.

    Planning, on the host, is not timed. lengths: of the requests; shared: of their prefix.
    """
    from flashinfer import MultiLevelCascadeAttentionWrapper

    rows = len(lengths)
    own = torch.tensor([length - shared for length in lengths])

    def starts(counts: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros(1), counts.cumsum(0)]).int().to(DEVICE)

    tables = [row[shared:length] for row, length in zip(pool.table, lengths, strict=True)]
    workspace = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    wrapper = MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    wrapper.plan(
        [starts(torch.tensor([rows])), starts(torch.ones(rows))],
        [starts(torch.tensor([shared])), starts(own)],
        [pool.table[0, :shared].contiguous(), torch.cat(tables)],
        [torch.ones(n, dtype=torch.int32, device=DEVICE) for n in (1, rows)],
        KV_HEADS * GROUP,
        KV_HEADS,
        DIM,
        1,
        sm_scale=SCALE,
        q_data_type=DTYPE,
    )
    paged = tuple(cache[:, None] for cache in (pool.k, pool.v))
    return lambda: wrapper.run(q, paged)
