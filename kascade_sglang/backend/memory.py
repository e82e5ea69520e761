"""What is allocated beside the KV pool: counted by making the same buffers without memory."""

from typing import NamedTuple

from kascade_kernels.budget import TILE
from kascade_kernels.copy_keys import allocate_key_copy
from kascade_sglang.backend.decode import DecodeBuffers
from kascade_sglang.backend.extend import allocate_lists
from kascade_sglang.backend.sizes import Sizes, copied_layers
from kascade_sglang.config import KascadeConfig
from kascade_sglang.host.facts import ServerFacts

NO_MEMORY = "meta"
"""Torch's device whose tensors have a size and no memory."""


class ReservedMemory(NamedTuple):
    """Bytes of one rank that the KV pool must leave. per_token: for each token of the pool."""

    per_token: int
    scratch: int


def reserved_memory(facts: ServerFacts, config: KascadeConfig) -> ReservedMemory:
    """Count what a rank's paths allocate; nothing where the kernels do not run."""
    if not facts.gpu or config.selection != "topk":
        return ReservedMemory(0, 0)
    heads = config.plan.shape.kv_heads // facts.tensor_ranks
    sizes = Sizes.of(config, heads, facts.model.context, facts.chain)
    copy = allocate_key_copy(1, sizes.kv_heads, sizes.head_dim, NO_MEMORY)
    batches = (facts.captured_decode, facts.eager_decode)
    decode = sum(DecodeBuffers(most, sizes, config, NO_MEMORY).nbytes for most in batches if most)
    tiles = -(-facts.largest_prefill // TILE) if config.sparse_prefill else 0
    slots = tiles * sizes.lists * sizes.longest_prefill_list
    prefill = allocate_lists(slots, NO_MEMORY)
    # A rank holds as many anchors as the layers of a stage at most.
    layers = -(-config.plan.shape.layers // facts.stages)
    copies = min(len(copied_layers(config, range(config.plan.shape.layers))), layers)
    return ReservedMemory(
        per_token=copies * sum(tensor.nbytes for tensor in copy),
        scratch=config.score_memory + decode + prefill.nbytes,
    )
