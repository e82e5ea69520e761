"""Run a model densely over prompts: similarity, recovered mass, importance.

While the statistics are taken every layer attends *densely*; the authors' code runs each layer on
its own oracle Top-k instead. Per prompt the keys of all layers and the queries of the sampled
tiles are kept; scores exist for one tile at a time, so memory grows with layers x length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from kascade_kernels.budget import TILE, Budget
from kascade_sglang.calibration.hf_attention import DenseAttention, LayerCall, our_attention
from kascade_sglang.calibration.hf_model import (
    decoder_layers,
    input_ids,
    shape_of,
    windowed_layers,
)
from kascade_sglang.calibration.importance import importance_hooks
from kascade_sglang.calibration.limited_attention import Limits, layer_scores
from kascade_sglang.calibration.similarity import own_mass, tile_similarity
from kascade_sglang.errors import CalibrationError

ATTENTION = "dense"
"""What the layers attend to while statistics are taken; recorded in the plan."""

MASS_RATIOS = (0.05, 0.1, 0.2)
"""Budgets at which the mass that a head's own Top-k recovers is measured."""


@dataclass(frozen=True)
class PromptStats:
    """What one prompt shows of the M layers with full attention, H KV heads each.

    similarity: float32 [M, M, H, H], indexed [i, j, h_j, h_i], the least over tiles.
    pooled: float32 [M, M], the same with one Top-k for all heads of a layer.
    mass: float64 [len(MASS_RATIOS), M, H], the share of the attention mass that a head's own
        Top-k recovers, the mean over tiles.
    importance: float64 [M], 1 - cos(x, x + attention(x)), the mean over tokens, x being the
        residual stream before the layer.
    """

    similarity: np.ndarray
    pooled: np.ndarray
    mass: np.ndarray
    importance: np.ndarray
    tokens: int
    tiles: int


@dataclass(frozen=True)
class LayerStats:
    """What calibration measures of a model: the mean of PromptStats over prompts, float64.

    layers: which layers were measured, those with full attention; M of them, ascending.
    """

    layers: tuple[int, ...]
    similarity: np.ndarray
    pooled: np.ndarray
    mass: np.ndarray
    importance: np.ndarray
    prompts: int
    tokens: int
    tiles: int


def sample_tiles(length: int, budget: Budget, count: int, seed: int) -> list[int]:
    """Pick up to ``count`` full tiles whose budget is not dense, evenly spread.

    A tile that attends to everything proves nothing. The seed shifts the stride.
    """
    sparse = [tile for tile in range(length // TILE) if not budget.is_dense(tile)]
    if len(sparse) <= count:
        return sparse
    shift = np.random.default_rng(seed).random()
    return [sparse[int((step + shift) * len(sparse) / count)] for step in range(count)]


class _Recorder(DenseAttention):
    """Dense attention that keeps the measured layers' keys and the sampled tiles' queries."""

    def __init__(self, tiles: Sequence[int], layers: Sequence[int]) -> None:
        self._tiles, self._layers = tiles, layers
        self._queries: dict[int, list[torch.Tensor]] = {}  # layer -> per tile [32, Hq, D]
        self.keys: dict[int, torch.Tensor] = {}  # layer -> [L, H, D]
        self.scales: dict[int, float] = {}
        self.limits_of: dict[int, Limits] = {}

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Attend in a layer; one with a window is not measured."""
        limits = call.limits
        if limits.window is not None and limits.window >= len(call.k):
            limits = replace(limits, window=None)  # it hides nothing
        if call.layer in self._layers and limits.window is not None:
            raise CalibrationError(
                f"model: layer {call.layer} has a sliding window of {limits.window} tokens, which "
                "its configuration does not say; not supported"
            )
        self._keep(call.layer, call.q, call.k, call.scale)
        self.limits_of[call.layer] = limits
        return super().attend(call._replace(limits=limits))

    def _keep(self, layer: int, q: torch.Tensor, k: torch.Tensor, scale: float) -> None:
        if layer in self._layers:
            self.keys[layer], self.scales[layer] = k, scale
            # Copies, so that the queries of the other tiles are freed.
            tiles = [slice(TILE * tile, TILE * (tile + 1)) for tile in self._tiles]
            self._queries[layer] = [q[tile].clone() for tile in tiles]

    def check_complete(self) -> None:
        """Refuse a model some of whose layers attended without calling us."""
        missing = sorted(set(self._layers) - set(self.keys))
        if missing:
            raise CalibrationError(
                f"model: layers {missing} gave no access to their attention; expected decoders "
                "built on transformers' AttentionInterface, as Llama, Qwen, Mistral, Phi-3 and "
                "Gemma are"
            )

    def tile_scores(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [M, H, C] and own-tile mass [M, H] of the index-th sampled tile."""
        end = TILE * (self._tiles[index] + 1)
        # A sharded model's layers lie on several devices; the scores meet on the first one's.
        home = self.keys[self._layers[0]].device
        scores = torch.stack([self._scores(layer, index, end).to(home) for layer in self._layers])
        group = self._queries[self._layers[0]][index].shape[1] // scores.shape[1]
        # Each query's mass is 1. A sink's share counts as its own: nothing is lost of it, either.
        own = group * TILE - scores.sum(dim=-1)
        return scores, own.clamp_(min=0.0)

    def _scores(self, layer: int, index: int, end: int) -> torch.Tensor:
        q, k, scale = self._queries[layer][index], self.keys[layer][:end], self.scales[layer]
        return layer_scores(q, k, scale, self.limits_of[layer])


def _measure_tiles(
    recorder: _Recorder, tiles: Sequence[int], budget: Budget, on_tile: Callable[[], object]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least similarity per head [M, M, H, H] and pooled [M, M]; mean mass [ratios, M, H]."""
    per_head = pooled = mass = None
    at_ratios = [Budget(ratio, budget.min_k) for ratio in MASS_RATIOS]
    for index, tile in enumerate(tiles):
        scores, own = recorder.tile_scores(index)
        count = budget.selected(tile)
        heads = tile_similarity(scores, own, count)
        layer = tile_similarity(scores.sum(1, keepdim=True), own.sum(1, keepdim=True), count)
        share = own_mass(scores, own, [ratio.selected(tile) for ratio in at_ratios]).double()
        per_head = heads if per_head is None else torch.minimum(per_head, heads)
        pooled = layer if pooled is None else torch.minimum(pooled, layer)
        mass = share if mass is None else mass + share
        on_tile()
    if per_head is None or pooled is None or mass is None:
        raise CalibrationError("prompt: no tile is long enough for the budget to leave keys out")
    return per_head, pooled[:, :, 0, 0], mass / len(tiles)


def work_of(length: int, depth: int) -> int:
    """Work of ``measure_prompt``, in layers times tokens run: a pass, and tiles that take one."""
    return 2 * length * depth


@torch.inference_mode()
def measure_prompt(
    model: PreTrainedModel,
    ids: Sequence[int],
    tiles: Sequence[int],
    budget: Budget,
    layers: Sequence[int],
    on_work: Callable[[float], object] = lambda work: None,
) -> PromptStats:
    """Measure one prompt with one dense forward pass.

    ids: its tokens. tiles: the full tiles to measure. layers: those with full attention. on_work:
    called after every tile with its share of ``work_of``.
    Raises CalibrationError where there is no tile and for unsupported models.
    """
    recorder = _Recorder(tiles, layers)
    with our_attention(model):
        modules = decoder_layers(model)
        with importance_hooks(modules) as importance:
            model.get_decoder()(input_ids(model, ids), use_cache=False, kascade=recorder)
    recorder.check_complete()
    share = work_of(len(ids), len(modules)) / max(1, len(tiles))
    per_head, pooled, mass = _measure_tiles(recorder, tiles, budget, lambda: on_work(share))
    turns = np.array([importance[layer] for layer in layers])
    similarity, own = per_head.cpu().numpy(), mass.cpu().numpy()
    _require_finite(similarity, own, turns)
    return PromptStats(
        similarity=similarity,
        pooled=pooled.cpu().numpy(),
        mass=own,
        importance=turns,
        tokens=len(ids),
        tiles=len(tiles),
    )


def _require_finite(*measured: np.ndarray) -> None:
    if not all(np.isfinite(numbers).all() for numbers in measured):
        raise CalibrationError("model: its attention is not finite; try --dtype float32")


def average(layers: Sequence[int], measured: Sequence[PromptStats]) -> LayerStats:
    """Average prompts, summed in their order, so that the same prompts give the same bits."""

    def mean(field: str) -> np.ndarray:
        total = np.zeros_like(getattr(measured[0], field), dtype=np.float64)
        for stats in measured:
            total += getattr(stats, field)
        return total / len(measured)

    return LayerStats(
        layers=tuple(layers),
        similarity=mean("similarity"),
        pooled=mean("pooled"),
        mass=mean("mass"),
        importance=mean("importance"),
        prompts=len(measured),
        tokens=sum(stats.tokens for stats in measured),
        tiles=sum(stats.tiles for stats in measured),
    )


def full_layers(model: PreTrainedModel, longest: int) -> tuple[int, ...]:
    """Return the layers that can select or reuse keys of prompts of up to ``longest`` tokens."""
    windowed = windowed_layers(model.config, longest)
    return tuple(layer for layer in range(shape_of(model.config).layers) if layer not in windowed)


def collect(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    budget: Budget,
    tiles_per_prompt: int = 64,
    seed: int = 0,
    on_work: Callable[[float], object] = lambda work: None,
) -> LayerStats:
    """Measure a model over prompts; see ``measure_prompt``.

    prompts: token ids; each long enough for a tile that is not dense.
    Raises CalibrationError for a prompt that is too short and for unsupported models.
    """
    layers = full_layers(model, max(map(len, prompts)))
    measured = [
        measure_prompt(
            model,
            ids,
            sample_tiles(len(ids), budget, tiles_per_prompt, seed + number),
            budget,
            layers,
            on_work,
        )
        for number, ids in enumerate(prompts)
    ]
    return average(layers, measured)
