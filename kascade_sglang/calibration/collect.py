"""Run a model densely over prompts and measure similarity and importance.

While the statistics are taken every layer attends *densely*; the authors' code runs each layer on
its own oracle Top-k instead. Per prompt the keys of all layers and the queries of the sampled
tiles are kept; scores exist for one tile at a time, so memory grows with layers x length.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from kascade_kernels.budget import TILE, Budget
from kascade_kernels.reference import anchor_scores
from kascade_sglang.calibration.errors import CalibrationError
from kascade_sglang.calibration.hf_attention import dense_attention, our_attention
from kascade_sglang.calibration.hf_model import decoder_layers, shape_of
from kascade_sglang.calibration.similarity import tile_similarity

ATTENTION = "dense"
"""What the layers attend to while statistics are taken; recorded in the plan."""

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class LayerStats:
    """What calibration measures of a model.

    similarity: float64 [layers, layers, H, H], indexed [i, j, h_j, h_i]; the least over a
        prompt's tiles, the mean over prompts.
    pooled: float64 [layers, layers], the same with one Top-k for all heads of a layer.
    importance: float64 [layers], 1 - cos(x, x + attention(x)), the mean over tokens, x being the
        residual stream before the layer (pre-norm decoders).
    """

    similarity: np.ndarray
    pooled: np.ndarray
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


class _Recorder:
    """Dense attention that keeps each layer's keys and the sampled tiles' queries."""

    def __init__(self, tiles: Sequence[int]) -> None:
        self._tiles = tiles
        self.queries: dict[int, list[torch.Tensor]] = {}  # layer -> per tile [32, Hq, D]
        self.keys: dict[int, torch.Tensor] = {}  # layer -> [L, H, D]
        self.scale: dict[int, float] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        # Copies, so that the queries of the other tiles are freed.
        self.queries[layer] = [q[TILE * tile : TILE * (tile + 1)].clone() for tile in self._tiles]
        self.keys[layer] = k
        self.scale[layer] = scale
        return dense_attention(q, k, v, scale)

    def tile_scores(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [layers, H, C] and own-tile mass [layers, H] of the index-th sampled tile."""
        end = TILE * (self._tiles[index] + 1)
        scores = torch.stack(
            [
                anchor_scores(queries[index], self.keys[layer][:end], self.scale[layer])
                for layer, queries in sorted(self.queries.items())
            ]
        )
        group = self.queries[0][index].shape[1] // scores.shape[1]
        own = group * TILE - scores.sum(dim=-1)  # each query's mass is 1
        return scores, own.clamp_(min=0.0)


@contextmanager
def _importance_hooks(layers: Sequence[nn.Module], importance: np.ndarray) -> Iterator[None]:
    """Within the block, a forward pass adds each layer's mean 1 - cos to ``importance``."""
    inputs: dict[int, torch.Tensor] = {}

    def remember(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def compare(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple) -> None:
            importance[index] += _mean_turn(inputs.pop(index)[0], output[0][0])

        return hook

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(remember(index), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(compare(index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_turn(x: torch.Tensor, attention: torch.Tensor) -> float:
    """Mean over tokens of 1 - cos(x, x + attention); both [L, hidden]."""
    total = 0.0
    pieces = zip(x.split(_TOKENS_AT_ONCE), attention.split(_TOKENS_AT_ONCE), strict=True)
    for before, update in pieces:
        cosine = functional.cosine_similarity(
            before.float(), before.float() + update.float(), dim=-1
        )
        total += float((1.0 - cosine).double().sum())
    return total / len(x)


def least_similarity(
    recorder: _Recorder, tiles: Sequence[int], budget: Budget, on_tile: Callable[[], object]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least similarity over tiles: per head [layers, layers, H, H], pooled [layers, layers]."""
    per_head = pooled = None
    for index, tile in enumerate(tiles):
        scores, own = recorder.tile_scores(index)
        count = budget.selected(tile)
        heads = tile_similarity(scores, own, count)
        layer = tile_similarity(scores.sum(1, keepdim=True), own.sum(1, keepdim=True), count)
        per_head = heads if per_head is None else torch.minimum(per_head, heads)
        pooled = layer if pooled is None else torch.minimum(pooled, layer)
        on_tile()
    if per_head is None or pooled is None:
        raise CalibrationError("prompt: no tile is long enough for the budget to leave keys out")
    return per_head, pooled[:, :, 0, 0]


@torch.inference_mode()
def collect(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    budget: Budget,
    tiles_per_prompt: int = 64,
    seed: int = 0,
    on_tile: Callable[[], object] = lambda: None,
) -> LayerStats:
    """Measure a model over prompts, one dense forward pass each.

    prompts: token ids; each long enough for a tile that is not dense.
    on_tile: called after every tile, for a progress bar.
    Raises CalibrationError for a prompt that is too short and for unsupported models.
    """
    shape, layers = shape_of(model.config), decoder_layers(model)
    similarity = np.zeros((shape.layers, shape.layers, shape.kv_heads, shape.kv_heads))
    pooled = np.zeros((shape.layers, shape.layers))
    importance = np.zeros(shape.layers)
    tiles_seen = 0
    for number, prompt in enumerate(prompts):
        tiles = sample_tiles(len(prompt), budget, tiles_per_prompt, seed + number)
        recorder = _Recorder(tiles)
        input_ids = torch.tensor([list(prompt)], device=model.device)
        with our_attention(model), _importance_hooks(layers, importance):
            model.get_decoder()(input_ids=input_ids, use_cache=False, kascade=recorder)
        per_head, layer = least_similarity(recorder, tiles, budget, on_tile)
        if not (per_head.isfinite().all() and np.isfinite(importance).all()):
            raise CalibrationError("model: its attention is not finite; try --dtype float32")
        similarity += per_head.double().cpu().numpy()
        pooled += layer.double().cpu().numpy()
        tiles_seen += len(tiles)
    return LayerStats(
        similarity=similarity / len(prompts),
        pooled=pooled / len(prompts),
        importance=importance / len(prompts),
        prompts=len(prompts),
        tokens=sum(len(prompt) for prompt in prompts),
        tiles=tiles_seen,
    )
