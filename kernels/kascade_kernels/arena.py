"""One piece of memory that launches cut their scratch from, so that its size has a bound."""

from collections.abc import Callable
from math import prod

import torch

Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes an uninitialised tensor of a shape and dtype."""

ALIGNMENT = 256
"""Bytes; every tensor starts at a multiple, as torch's own allocations do."""


def empty_on(device: torch.device | str) -> Empty:
    """Return a function that allocates on a device."""
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)


class Arena:
    """``size`` bytes on a device. Tensors cut after one ``cut()`` overlap those of another."""

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.size = size
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)

    def cut(self) -> Empty:
        """Return a function that cuts tensors from the start on, one after the other.

        It raises ValueError where the arena is too small.
        """
        used = 0

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            nonlocal used
            first, size = used, prod(shape) * dtype.itemsize
            used += -(-size // ALIGNMENT) * ALIGNMENT
            if used > self.size:
                raise ValueError(f"arena: expected at most {self.size} bytes, got {used}")
            return self._memory[first : first + size].view(dtype).view(shape)

        return empty
