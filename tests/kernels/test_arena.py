"""Scratch cut from one piece of memory."""

import pytest
import torch

from kascade_kernels.arena import Arena


def test_tensors_of_one_cut_do_not_overlap() -> None:
    empty = Arena(4096, "cpu").cut()
    first, second = empty((3, 5), torch.float32), empty((7,), torch.int16)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all() and first.shape == (3, 5) and second.shape == (7,)
    assert second.data_ptr() - first.data_ptr() == 256


def test_the_next_cut_starts_over() -> None:
    arena = Arena(1024, "cpu")
    assert arena.cut()((4,), torch.int64).data_ptr() == arena.cut()((9,), torch.uint8).data_ptr()


def test_more_than_there_is() -> None:
    empty = Arena(1024, "cpu").cut()
    empty((512,), torch.uint8)
    with pytest.raises(ValueError, match="at most 1024 bytes, got 1112"):
        empty((600,), torch.uint8)


def test_tensors_that_fill_it_fit_however_they_are_aligned() -> None:
    empty = Arena(257 * 4, "cpu").cut()
    assert len({empty((257,), torch.uint8).data_ptr() for _ in range(4)}) == 4
    with pytest.raises(ValueError, match="at most 1028 bytes, got 1029"):
        empty((1,), torch.uint8)
