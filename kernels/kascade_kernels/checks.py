"""Checks of tensors that reach a kernel: ``name: expected, got``. Cheap enough for every launch."""

import torch


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
