"""What computes a step: kernels on a GPU, the torch reference elsewhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import triton

from kascade_kernels.arena import Arena
from kascade_kernels.budget import TILE
from kascade_kernels.decode_scores import ScoreScratch
from kascade_kernels.launch import KERNEL_TILE
from kascade_sglang.backend.decode_path import DecodePath
from kascade_sglang.backend.extend_path import ExtendPath
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.key_copies import KeyCopies
from kascade_sglang.backend.rank_shape import RankShape
from kascade_sglang.backend.reference_path import ReferencePath
from kascade_sglang.backend.warm_up import warm_up
from kascade_sglang.config import MB, KascadeConfig
from kascade_sglang.errors import KascadeError

if TYPE_CHECKING:
    from kascade_sglang.compat import ModelRunner

logger = logging.getLogger(__name__)


class Paths(NamedTuple):
    """How steps are computed, and what they share."""

    decode: DecodePath | ReferencePath
    extend: ExtendPath | ReferencePath
    store: IndexStore
    copies: KeyCopies
    shape: RankShape


def runs_kernels(device: str, config: KascadeConfig) -> bool:
    """Whether steps run through the kernels: on a GPU or in Triton's interpreter."""
    return config.selection == "topk" and (
        device.startswith("cuda") or triton.knobs.runtime.interpret
    )


def build_paths(runner: ModelRunner, config: KascadeConfig) -> Paths:
    """Build the paths of one model runner; raises KascadeError where scores have no room."""
    shape = RankShape.of(runner, config)
    kernels = runs_kernels(shape.device, config)
    store = IndexStore(config, shape.heads, shape.device, one_list=kernels and config.pooled)
    copied = copied_layers(config, shape.layers) if kernels else []
    copies = KeyCopies(copied, shape)
    runs_on = "Triton kernels" if kernels else "the torch reference"
    scores = f"8-bit copies of layers {copied}" if copied else "exact keys"
    logger.info("kascade: attention runs through %s, scores use %s", runs_on, scores)
    if not kernels:
        reference = ReferencePath(runner, config, store)
        return Paths(reference, reference, store, copies, shape)
    if TILE != KERNEL_TILE:
        raise KascadeError(
            f"KASCADE_TILE: expected {KERNEL_TILE}, the kernels' tile, got {TILE}; other sizes are "
            "for the torch reference, on a CPU"
        )
    one_row = ScoreScratch.bytes_per_row(shape.q_heads, shape.lists, shape.context)
    if config.score_memory < one_row:
        raise KascadeError(
            f"score_memory_mb: expected at least {-(-one_row // MB)} for a context of "
            f"{shape.context} tokens, got {config.score_memory // MB}"
        )
    arena = Arena(config.score_memory, shape.device)
    parts = (runner, config, shape, store, copies, arena)
    paths = Paths(DecodePath(*parts), ExtendPath(*parts), store, copies, shape)
    if shape.device.startswith("cuda"):
        warm_up(paths, runner, config)
    return paths


def copied_layers(config: KascadeConfig, layers: range) -> list[int]:
    """Layers that score with 8-bit copies of their keys."""
    return [] if config.exact else [layer for layer in config.plan.anchors if layer in layers]
