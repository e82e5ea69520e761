"""How every kernel is launched: the one table to extend for another GPU.

A kernel takes the first of its rows whose conditions hold. Its last row has none: the default, for
GPUs, head dimensions and groups that nobody measured. Other rows were measured on an H100 at head
dimension 128 and a group of 4. Names are the kernels', after a dot how they read the keys.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeVar

import torch

STEP = 64
"""Keys of one block in decoding, in which spans are counted: the compiler then knows their
alignment. Buffers are laid out by it."""
CHUNK = 2048
"""Codes that selection counts together; their counts fit 16 bits. Buffers are laid out by it."""
FEW = 256
"""Codes of a chunk that are cheaper to count one at a time."""
INVARIANT_SPLITS = 16
"""Programs of each row and head where a row must not depend on its batch."""

HOPPER = 9
"""Where wgmma is, which computes 64 rows a warp group."""


class Launch(NamedTuple):
    """A launch; what a kernel has no use for is 0.

    num_warps, num_stages: what the compiler takes.
    block: what one step of a program reads: keys, slots, partial results or chunks.
    span: keys of one program, where the grid follows from the longest row.
    programs: those of all lists together, which share the lists' chunks.
    per_row: programs of each row; the grid must not depend on lengths, which the host does not
        know.
    """

    num_warps: int
    num_stages: int = 3
    block: int = 0
    span: int = 0
    programs: int = 0
    per_row: int = 0

    def options(self) -> dict[str, int]:
        """Return what the compiler takes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Cut(NamedTuple):
    """How a decode step's lists are cut into programs.

    programs: of all rows and heads together, that spans are made for.
    grid: of all rows and heads together, that the grid has room for.
    most: of one row and head.
    """

    programs: int
    grid: int
    most: int


class Where(NamedTuple):
    """Conditions of a row; None holds anywhere.

    capability: major compute capability. key_bytes: head dimension in bytes, at most.
    group: query heads of a KV head, at most.
    """

    capability: int | None = None
    key_bytes: int | None = None
    group: int | None = None

    def holds(self, capability: int | None, key_bytes: int, group: int) -> bool:
        """Whether the row may be taken."""
        return (
            self.capability in (None, capability)
            and (self.key_bytes is None or key_bytes <= self.key_bytes)
            and (self.group is None or group <= self.group)
        )


DEFAULT = Where()

# Another span of a log-sum-exp gives other last bits, so it may not depend on anything but the
# tile. Tiles at up to 256 bytes a key: two programs an SM. For longer keys, and where wgmma is not,
# four warps would spill the accumulator of attention; a product of 128 columns with 64 keys a step,
# or 128 in 8 bits, scored fastest: wider ones or more warps cost 10 to 50 %.
# Decoding: with one or two warps the maximum of a block is a matter of few threads. Blocks of fp8
# keys are half as long, so more of them must be on their way (decode_launches_h200.csv).
TABLE: dict[str, list[tuple[Where, Launch]]] = {
    "tile_lse": [
        (Where(key_bytes=256), Launch(8, 3, block=128, span=2048)),
        (DEFAULT, Launch(8, 3, block=64, span=2048)),
    ],
    "merge_lse": [(DEFAULT, Launch(4))],
    "tile_scores": [
        (Where(HOPPER, key_bytes=256, group=8), Launch(4, 3, block=64, span=4096)),
        (Where(key_bytes=256, group=8), Launch(8, 3, block=64, span=4096)),
        (Where(key_bytes=256), Launch(8, 3, block=128, span=4096)),
        (DEFAULT, Launch(8, 2, block=64, span=4096)),
    ],
    "tile_scores.8bit": [
        (Where(HOPPER, key_bytes=128, group=4), Launch(4, 3, block=128, span=4096)),
        (Where(HOPPER, key_bytes=128, group=8), Launch(4, 3, block=64, span=4096)),
        (Where(key_bytes=256, group=4), Launch(8, 3, block=128, span=4096)),
        (Where(key_bytes=256, group=8), Launch(8, 3, block=64, span=4096)),
        (Where(key_bytes=256), Launch(8, 3, block=128, span=4096)),
        (Where(group=4), Launch(8, 2, block=128, span=4096)),
        (DEFAULT, Launch(8, 2, block=64, span=4096)),
    ],
    "tile_attention": [
        (Where(HOPPER, key_bytes=256), Launch(4, 2, block=64)),
        (Where(HOPPER), Launch(8, 3, block=32)),
        (Where(key_bytes=256), Launch(8, 3, block=64)),
        (DEFAULT, Launch(8, 2, block=32)),
    ],
    "decode_lists": [(DEFAULT, Launch(4))],
    "decode_scores": [(DEFAULT, Launch(1, 6))],
    "decode_scores.8bit": [(DEFAULT, Launch(2, 6))],
    "decode_scores.attend": [(DEFAULT, Launch(2, 5))],
    "pool_scores": [(DEFAULT, Launch(4, programs=2048))],
    "decode_attention": [(DEFAULT, Launch(4, 4))],
    "decode_attention.fp8": [(DEFAULT, Launch(2, 5))],
    "merge_parts": [(DEFAULT, Launch(1, block=4))],
    "count_high": [(DEFAULT, Launch(4, programs=2048))],
    "find_high": [(DEFAULT, Launch(4, block=16))],
    "count_low": [(DEFAULT, Launch(4, programs=2048))],
    "find_low": [(DEFAULT, Launch(4, block=16))],
    "emit_slots": [(DEFAULT, Launch(4, programs=2048))],
    "group_rows": [(DEFAULT, Launch(1))],
    "compare_slots": [(DEFAULT, Launch(4, block=1024, per_row=32))],
    "copy_row_slots": [(DEFAULT, Launch(4, block=1024, per_row=32))],
    "copy_keys": [(DEFAULT, Launch(4))],
}

CUTS: dict[str, list[tuple[Where, Cut]]] = {
    "score": [(DEFAULT, Cut(8192, 8192, most=64))],
    # Attention runs best as one wave of four programs an SM.
    "attend": [(DEFAULT, Cut(512, 4096, most=32))],
}


@cache
def capability_of(device: torch.device) -> int | None:
    """Return a GPU's major compute capability; None where there is none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def launch(kernel: str, device: torch.device, key_bytes: int = 0, group: int = 1) -> Launch:
    """Return how a kernel is launched, by its name in the table."""
    return _first(TABLE[kernel], device, key_bytes, group)


def cut(kind: str, device: torch.device) -> Cut:
    """Return how lists are cut to "score" or to "attend"."""
    return _first(CUTS[kind], device)


Value = TypeVar("Value", Launch, Cut)


def _first(
    rows: list[tuple[Where, Value]], device: torch.device, key_bytes: int = 0, group: int = 1
) -> Value:
    capability = capability_of(device)
    return next(value for where, value in rows if where.holds(capability, key_bytes, group))
