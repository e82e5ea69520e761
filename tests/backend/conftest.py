"""Scratch that a launch did not write is NaN, or the largest code, for whoever reads it."""

import pytest

from kascade_kernels.arena import Arena, Empty


@pytest.fixture(autouse=True)
def poisoned_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what launches cut their scratch from with ones, which every launch finds anew.

    The arena is bytes, so ``poisoned_outputs`` leaves it alone.
    """
    cut = Arena.cut

    def poisoned(arena: Arena) -> Empty:
        arena._memory.fill_(0xFF)
        return cut(arena)

    monkeypatch.setattr(Arena, "cut", poisoned)
