"""What is allocated beside the KV pool: counted by making the same buffers without memory."""

from typing import NamedTuple

from kascade_kernels.budget import TILE
from kascade_kernels.key_copy import allocate_key_copy
from kascade_sglang.backend.decode import DecodeBuffers
from kascade_sglang.backend.extend import allocate_lists
from kascade_sglang.backend.sizes import Sizes, copied_layers
from kascade_sglang.config import KascadeConfig

NO_MEMORY = "meta"
"""Torch's device whose tensors have a size and no memory."""


class ReservedMemory(NamedTuple):
    """Bytes of one rank that the KV pool must leave. per_token: for each token of the pool."""

    per_token: int
    scratch: int


def reserved_memory(
    config: KascadeConfig, sizes: Sizes, layers: range, decodes: tuple[int, ...], new_tokens: int
) -> ReservedMemory:
    """Count what the kernels' paths allocate.

    layers: those of a rank. decodes: requests of each set of decode buffers, 0 for none.
    new_tokens: the most that a prefill step holds.
    """
    copy = allocate_key_copy(1, sizes.kv_heads, sizes.head_dim, NO_MEMORY)
    decode = sum(DecodeBuffers(rows, sizes, config, NO_MEMORY).nbytes for rows in decodes if rows)
    tiles = -(-new_tokens // TILE)
    prefill = allocate_lists(tiles * sizes.lists * sizes.longest_list, NO_MEMORY)
    return ReservedMemory(
        per_token=len(copied_layers(config, layers)) * sum(tensor.nbytes for tensor in copy),
        scratch=config.score_memory + decode + prefill.nbytes,
    )
