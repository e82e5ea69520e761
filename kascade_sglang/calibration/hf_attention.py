"""Run a Hugging Face decoder with attention of our own: one call per layer, one request.

Callables plug in: ``KascadeAttention`` below, the oracle that servers are compared with, and
``DenseAttention``, of which calibration's are kinds. No attention mask is ever built: no mask
function is registered under our name, so transformers passes None and each callable masks by
position.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from kascade_kernels.budget import TILE, tile_of
from kascade_kernels.reference import pool_heads, select_topk, tile_attention, tile_scores
from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.calibration.limited_attention import Limits, limited_attention
from kascade_sglang.errors import CalibrationError
from kascade_sglang.plan.schema import LayerRole, Plan

IMPLEMENTATION = "kascade_reference"
"""The name under which transformers knows our attention."""

_UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
}
_MASKED_QUERIES_AT_ONCE = 128


class LayerAttention(Protocol):
    """Attention of one layer for one request.

    What also computes layers with a window, capped logits or sinks has ``attend``, and the names of
    these options in ``limits``.
    """

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend causally: q [n, Hq, D] at the last n of the L positions of k, v [L, H, D].

        Returns [n, Hq, D] in q's dtype.
        """


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    kascade: LayerAttention | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Hand one layer's [1, heads, tokens, D] to the callable in ``kascade``."""
    allowed = getattr(kascade, "limits", ())
    for name, what in _UNSUPPORTED.items():
        if options.get(name) is not None and name not in allowed:
            raise CalibrationError(f"model: layer {module.layer_idx} has {what}; not supported")
    if kascade is None or attention_mask is not None or query.shape[0] != 1:
        raise CalibrationError(
            f"model: {type(module).__name__} does not pass one unpadded request and its keyword "
            "arguments on to its attention; not supported"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    of_layer = [options.get(name) for name in _UNSUPPORTED]
    if any(option is not None for option in of_layer):
        limits = Limits(*of_layer)
        call = LayerCall(module.layer_idx, q, k, v, scale, limits)
        return kascade.attend(call).unsqueeze(0), None
    return kascade(module.layer_idx, q, k, v, scale).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _forward)


@contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, ``model(..., kascade=callable)`` attends through the callable."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:  # transformers has only warned
        raise CalibrationError(
            f"model: {type(model).__name__} gives no access to its attention; expected one built "
            "on transformers' AttentionInterface, as Llama, Qwen, Mistral, Phi-3 and Gemma are"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def query_tiles(q: torch.Tensor, length: int) -> Iterator[tuple[int, torch.Tensor, int]]:
    """Cut the queries of the last positions of a request at tile boundaries.

    q: [n, Hq, D] at positions [length - n, length). Yields (tile, its queries, the position after
    its last query).
    """
    first = length - q.shape[0]
    for tile in range(tile_of(first), tile_of(length - 1) + 1):
        start, end = max(first, TILE * tile), min(length, TILE * (tile + 1))
        yield tile, q[start - first : end - first], end


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention to every key through torch's SDPA; shapes as in LayerAttention."""
    n, length = q.shape[0], k.shape[0]
    mask = None
    if 1 < n < length:
        # On a GPU, SDPA with a mask and grouped heads may hold a number for every query and key.
        if n > _MASKED_QUERIES_AT_ONCE:
            blocks = q.split(_MASKED_QUERIES_AT_ONCE)
            ends = [length - n + end for end in accumulate(map(len, blocks))]
            pairs = zip(blocks, ends, strict=True)
            return torch.cat([dense_attention(one, k[:end], v[:end], scale) for one, end in pairs])
        mask = torch.ones(n, length, dtype=torch.bool, device=q.device).tril_(length - n)
    q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=n == length, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


class LayerCall(NamedTuple):
    """What one layer attends with; shapes as in LayerAttention."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    limits: Limits = Limits()


class DenseAttention:
    """Attention to all that a layer sees, with a window, soft-capped logits or sinks, too.

    Kinds that do more override ``attend``. Those of calibration know no sinks, so no layer's sinks
    come through transformers.
    """

    limits = ("sliding_window", "softcap")

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return self.attend(LayerCall(layer, q, k, v, scale))

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Return [n, Hq, D] in q's dtype."""
        if call.limits == Limits():
            return dense_attention(call.q, call.k, call.v, call.scale)
        return limited_attention(call.q, call.k, call.v, call.scale, call.limits)


class KascadeAttention:
    """Attention of one request under a plan, tile by tile through the reference operations.

    Holds each anchor's selection of the forward pass in progress; a layer that reuses one must
    be called after its anchor, with the same positions, as a decoder does. Layers that the plan
    names ``windowed`` attend in the model's window.
    """

    limits = ("sliding_window", "s_aux")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._selected: dict[int, dict[int, torch.Tensor]] = {}  # anchor -> tile -> [H or 1, k]

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend by the layer's role; an anchor first selects, layer 0 attends densely."""
        return self.attend(LayerCall(layer, q, k, v, scale))

    def attend(self, call: LayerCall) -> torch.Tensor:
        """The same of a layer that may have a window; CalibrationError for another plan's."""
        layer, q, k, v, scale, limits = call
        windowed = self._plan.role(layer) is LayerRole.WINDOW
        if windowed != (limits.window is not None):
            raise CalibrationError(
                f"model: layer {layer}: expected {'a' if windowed else 'no'} sliding window by the "
                f"plan, got {limits.window}; run `kascade calibrate` for this model"
            )
        if windowed:
            return limited_attention(q, k, v, scale, limits)
        length, sinks = k.shape[0], limits.sinks
        if layer in self._plan.anchors:
            self._selected[layer] = {
                tile: self._select(tile, q_tile, k[:end], scale, sinks)
                for tile, q_tile, end in query_tiles(q, length)
            }
        if self._plan.role(layer) is LayerRole.DENSE:
            return DenseAttention().attend(call)
        outputs = []
        for tile, q_tile, end in query_tiles(q, length):
            selected = self.keys_for(layer, tile)
            own = torch.arange(TILE * tile, end, device=q.device)
            where = (selected, own, scale)
            outputs.append(tile_attention(q_tile, k, v, *where, sinks=sinks))
        return torch.cat(outputs)

    def _select(
        self,
        tile: int,
        q: torch.Tensor,
        k: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the positions a tile's anchor selects: int64 [H, count], pooled [1, count]."""
        scores = tile_scores(q, k, scale, sinks)
        if self._plan.heads == "pooled":
            scores = pool_heads(scores)
        return select_topk(scores, self._plan.budget.selected(tile))

    def keys_for(self, layer: int, tile: int) -> torch.Tensor:
        """Return the positions before a tile that each KV head of a sparse layer attends to.

        int64 [H, count], of the tiles that the last forward pass computed.
        """
        selected = self._selected[self._plan.anchor_of[layer]][tile]
        if self._plan.heads == "pooled":
            return selected.expand(self._plan.shape.kv_heads, -1)
        if self._plan.role(layer) is LayerRole.ANCHOR:
            return selected
        return selected[list(self._plan.head_map[layer])]


def _logprobs(
    model: PreTrainedModel,
    attention: LayerAttention,
    input_ids: torch.Tensor,
    cache: DynamicCache,
    keep: int,
) -> torch.Tensor:
    """One forward pass of [1, n] tokens after the cache; float32 [keep or n, vocabulary]."""
    logits = model(
        input_ids=input_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
        kascade=attention,
    ).logits
    return torch.log_softmax(logits[0].float(), dim=-1)


def _as_row(input_ids: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    row = torch.as_tensor(input_ids, dtype=torch.int64, device=device).reshape(1, -1)
    if row.shape[1] == 0:
        raise ValueError("input_ids: expected at least one token")
    return row


@torch.inference_mode()
def kascade_generate(
    model: PreTrainedModel,
    plan: Plan,
    input_ids: Sequence[int] | torch.Tensor,
    max_new_tokens: int,
) -> tuple[list[int], list[float]]:
    """Continue a prompt greedily with Kascade attention; stop tokens are not honoured.

    input_ids: the prompt, prefilled in one pass. Decoding feeds one token a step through a KV
    cache, so each is a tile of one query.
    Returns the new tokens and the natural logarithm of each one's probability.
    Raises PlanError where the plan does not fit the model, CalibrationError for attention that
    is not plain causal.
    """
    plan.check_fits(shape_of(model.config))
    attention, cache = KascadeAttention(plan), DynamicCache(config=model.config)
    step = _as_row(input_ids, model.device)
    tokens: list[int] = []
    logprobs: list[float] = []
    with our_attention(model):
        for _ in range(max_new_tokens):
            row = _logprobs(model, attention, step, cache, keep=1)[-1]
            step = row.argmax().reshape(1, 1)
            tokens.append(int(step))
            logprobs.append(float(row[step]))
    return tokens, logprobs


@torch.inference_mode()
def kascade_prompt_logprobs(
    model: PreTrainedModel, plan: Plan, input_ids: Sequence[int] | torch.Tensor
) -> list[float]:
    """Natural log probability of each prompt token after the first, prefilled with Kascade."""
    plan.check_fits(shape_of(model.config))
    row = _as_row(input_ids, model.device)
    with our_attention(model):
        cache = DynamicCache(config=model.config)
        table = _logprobs(model, KascadeAttention(plan), row, cache, keep=0)
    return table[:-1].gather(1, row[0, 1:, None])[:, 0].tolist()
