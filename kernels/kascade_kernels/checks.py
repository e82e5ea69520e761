"""Checks of tensors that reach a kernel: ``name: expected, got``. Cheap enough for every launch."""

import torch

from kascade_kernels.structs import FP8, SINKS, Lists, PoolKeys, Rows


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless the shape matches; None matches any size."""
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(
        want is not None and want != size for want, size in zip(shape, found, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(found)}")


def require_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless the dtype is one of those given."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected {wanted}, got {str(tensor.dtype).removeprefix('torch.')}"
        )


def require_last_dim_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless elements of the last dimension lie side by side."""
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last stride of 1, got {tensor.stride(-1)}")


def require_heads_together(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the heads of each token, [tokens, heads, D], lie side by side."""
    _, heads, dim = tensor.shape
    if tensor.stride(2) != 1 or (heads > 1 and tensor.stride(1) != dim):
        raise ValueError(
            f"{name}: expected the heads of a token side by side, got strides {tensor.stride()}"
        )


def require_same_stride(name: str, tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Raise ValueError unless tokens lie as far apart as in ``other``."""
    if tensor.stride(0) != other.stride(0):
        raise ValueError(
            f"{name}: expected the keys' stride of {other.stride(0)}, got {tensor.stride(0)}"
        )


def require_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless elements lie side by side in order."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def require_lists(lists: Lists, rows: int, per_row: tuple[int, ...]) -> None:
    """Raise ValueError unless there are lists for each row, as many as one of ``per_row``."""
    require_shape("lists.counts", lists.counts, (rows, None))
    if lists.per_row not in per_row:
        wanted = " or ".join(map(str, sorted(set(per_row))))
        raise ValueError(f"lists: expected {wanted} a row, got {lists.per_row}")
    require_shape("lists.offsets", lists.offsets, tuple(lists.counts.shape))
    require_dtype("lists.slots", lists.slots, torch.int32)
    require_dtype("lists.offsets", lists.offsets, torch.int64)
    require_dtype("lists.counts", lists.counts, torch.int32)
    require_contiguous("lists.offsets", lists.offsets)
    require_contiguous("lists.counts", lists.counts)


def require_pool(pool: PoolKeys | None, rows: int, heads: int, lists: Lists) -> None:
    """Raise ValueError unless rows have as many pools as lists, and each KV head one of them."""
    if pool is not None:
        require_lists(pool.lists, rows, (lists.per_row,))
        require_shape("pool.head_map", pool.head_map, (heads,))
        require_dtype("pool.head_map", pool.head_map, torch.int32)


def require_sinks(sinks: torch.Tensor | None, q_heads: int) -> None:
    """Raise ValueError unless there is a sink for each query head, or none for any."""
    if sinks is not None:
        require_shape("sinks", sinks, (q_heads,))
        require_dtype("sinks", sinks, *SINKS)
        require_contiguous("sinks", sinks)


def require_lse(name: str, lse: torch.Tensor, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless these are log-sum-exps of query rows."""
    require_shape(name, lse, shape)
    require_dtype(name, lse, torch.float32)
    require_contiguous(name, lse)


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
    require_dtype("keys", keys, *((torch.int8,) if eight_bit else (q.dtype, *FP8)))
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
