"""What computes a rank's steps: kernels on a GPU, the torch reference elsewhere."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kascade_kernels.arena import Arena
from kascade_kernels.budget import TILE
from kascade_kernels.decode_scores import ScoreScratch
from kascade_kernels.launch import KERNEL_TILE
from kascade_kernels.structs import Lists
from kascade_sglang.backend.decode import DecodePath, DecodeStep
from kascade_sglang.backend.extend import ExtendPath, ExtendStep
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.kv import KeyValues
from kascade_sglang.backend.reference import ReferencePath, ReferenceStep, Selection
from kascade_sglang.backend.running import Running
from kascade_sglang.backend.sizes import Sizes, copied_layers, runs_kernels
from kascade_sglang.config import MB, KascadeConfig
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.runtime import releasable
from kascade_sglang.host.steps import Batch, Rank

if TYPE_CHECKING:
    from kascade_sglang.host.runtime import MHATokenToKVPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelPaths:
    """Steps through the kernels, and what they share."""

    decode: DecodePath
    extend: ExtendPath
    store: IndexStore[Lists]
    kv: KeyValues
    sizes: Sizes

    def begin(self, batch: Batch) -> Running[DecodeStep, Lists] | Running[ExtendStep, Lists]:
        """Record a batch's step."""
        if batch.decode:
            return Running.begin(self.decode, batch, self.store)
        return Running.begin(self.extend, batch, self.store)


@dataclass(frozen=True)
class ReferencePaths:
    """The same through the torch reference, one path for all."""

    decode: ReferencePath
    extend: ReferencePath
    store: IndexStore[Selection]
    kv: KeyValues
    sizes: Sizes

    def begin(self, batch: Batch) -> Running[ReferenceStep, Selection]:
        """Record a batch's step."""
        return Running.begin(self.decode, batch, self.store)


Paths = KernelPaths | ReferencePaths
"""How a rank's steps are computed."""
AnyPath = DecodePath | ExtendPath | ReferencePath
AnyRunning = (
    Running[DecodeStep, Lists] | Running[ExtendStep, Lists] | Running[ReferenceStep, Selection]
)


def build_paths(rank: Rank, pool: MHATokenToKVPool, config: KascadeConfig) -> Paths:
    """Build the paths of one rank; raises KascadeError where scores have no room."""
    sizes = Sizes.of(config, len(rank.heads), rank.table.shape[1], rank.chain)
    kernels = runs_kernels(rank.device, config)
    copied = copied_layers(config, rank.layers) if kernels else []
    with releasable(pool):
        kv = KeyValues(pool, copied, rank.slots, sizes.kv_heads, sizes.head_dim, rank.device)
    runs_on = "Triton kernels" if kernels else "the torch reference"
    scores = f"8-bit copies of layers {copied}" if copied else "the pool's own keys"
    logger.info("kascade: attention runs through %s, scores use %s", runs_on, scores)
    if not kernels:
        reference = ReferencePath(config, rank.table, kv)
        chosen = IndexStore[Selection](config, rank.heads, rank.device)
        return ReferencePaths(reference, reference, chosen, kv, sizes)
    _require_room(sizes, config)
    with releasable(pool):
        arena = Arena(config.score_memory, rank.device)
    return KernelPaths(
        DecodePath(config, sizes, rank.table, kv, arena),
        ExtendPath(config, sizes, rank.table, kv, arena),
        IndexStore[Lists](config, rank.heads, rank.device, one_list=config.pooled),
        kv,
        sizes,
    )


def _require_room(sizes: Sizes, config: KascadeConfig) -> None:
    if TILE != KERNEL_TILE:
        raise KascadeError(
            f"KASCADE_TILE: expected {KERNEL_TILE}, the kernels' tile, got {TILE}; other sizes are "
            "for the torch reference, on a CPU"
        )
    one_row = ScoreScratch.bytes_per_row(sizes.q_heads, sizes.lists, sizes.context)
    if config.score_memory < one_row:
        raise KascadeError(
            f"score_memory_mb: expected at least {-(-one_row // MB)} for a context of "
            f"{sizes.context} tokens, got {config.score_memory // MB}"
        )
