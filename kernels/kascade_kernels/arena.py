"""One piece of memory that launches cut their scratch from, so that its size has a bound."""

from collections.abc import Callable
from math import prod

import torch

Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes an uninitialised tensor of a shape and dtype."""

ALIGNMENT = 256
"""Bytes; every tensor starts at a multiple, as torch's own allocations do."""
MOST_TENSORS = 16
"""Cut by one launch, which the arena has room for however much alignment adds."""


def empty_on(device: torch.device | str) -> Empty:
    """Return a function that allocates on a device."""
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)


class Arena:
    """Room for tensors of ``size`` bytes together; those of one ``cut()`` overlap another's."""

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.size = size
        whole = size + MOST_TENSORS * ALIGNMENT
        self._memory = torch.empty(whole, dtype=torch.uint8, device=device)

    def cut(self) -> Empty:
        """Return a function that cuts tensors from the start on, one after the other.

        It raises ValueError where the arena is too small.
        """
        asked = used = 0

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            nonlocal asked, used
            first, size = used, prod(shape) * dtype.itemsize
            asked += size
            used += -(-size // ALIGNMENT) * ALIGNMENT
            if asked > self.size or used > len(self._memory):
                raise ValueError(f"arena: expected at most {self.size} bytes, got {asked}")
            return self._memory[first : first + size].view(dtype).view(shape)

        return empty
