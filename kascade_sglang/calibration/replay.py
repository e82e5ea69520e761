"""What happens to a model's answers when one layer attends to keys that an earlier layer selected.

Recovered attention mass says how much of a layer's attention other keys keep, not whether what is
lost matters. So the end of a prompt is run once more for every pair of layers: one layer borrows
keys where the model answers, the layers after it go on as they are, and the error is what has
become of the last hidden state.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.reference import select_topk, sparse_attention
from kascade_sglang.calibration.errors import CalibrationError
from kascade_sglang.calibration.hf_attention import LayerAttention, dense_attention
from kascade_sglang.calibration.hf_model import decoder_layers, last_norm
from kascade_sglang.calibration.limited_attention import (
    Limits,
    capped_sparse_attention,
    layer_scores,
    limited_attention,
)
from kascade_sglang.calibration.prompts import Prompt

MOST_ROWS = 128
"""Positions of a prompt at which errors are measured, the last ones."""
REACH = 1024
"""Tokens before a prompt's end among which they lie; from the first of them on all run again."""
_REPLAY_TOLERANCE = 0.01
"""Squared relative distance of a replay that changes nothing from the model, in low precision."""


def reply_rows(prompt: Prompt, budget: Budget) -> list[int]:
    """Positions near a prompt's end whose output is a token of a reply, ascending.

    Those whose budget covers every key lose nothing, whoever selects, and are left out.
    """
    rows = [at - 1 for begin, end in prompt.replies for at in range(max(begin, 1), end)]
    return _sparse(rows, len(prompt.ids), budget)


def answering_rows(prompt: Prompt, budget: Budget) -> list[int]:
    """Positions at which errors are measured: of replies, or a prompt's last ones without any."""
    return reply_rows(prompt, budget) or _sparse(range(len(prompt.ids)), len(prompt.ids), budget)


def _sparse(rows: Sequence[int], length: int, budget: Budget) -> list[int]:
    near = [row for row in rows if row >= length - REACH and not budget.is_dense(tile_of(row))]
    return near[-MOST_ROWS:]


class Recorded(Protocol):
    """What a dense pass leaves: by layer, K and V [L, H, D], the logits' scale and soft cap."""

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    scales: dict[int, float]
    softcaps: dict[int, float]


@contextmanager
def record_inputs(layers: Sequence[nn.Module], first: int) -> Iterator[list[tuple]]:
    """Within the block, a forward pass keeps each layer's input from position ``first`` on.

    Yields a list that fills with (hidden states [S, hidden], other positional arguments, named
    ones), cut likewise. Raises CalibrationError for hidden states that are not [1, L, hidden].
    """
    found: list[tuple] = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.ndim != 3 or hidden.shape[0] != 1:
            raise CalibrationError(
                f"model: expected layers that pass [1, tokens, hidden] on, got "
                f"{list(hidden.shape)}; --criterion mass does not run them one by one"
            )
        others = {name: value for name, value in kwargs.items() if name not in _NOT_KEPT}
        rest = (args[1:], others)
        found.append((hidden[0, first:].clone(), *_cut(rest, hidden.shape[1], first)))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


_NOT_KEPT = ("hidden_states", "kascade")


def _cut(value: Any, length: int, first: int) -> Any:
    """Cut positions [first, length) out of tensors [1, L, ...] and [L], wherever they are."""
    if isinstance(value, dict):
        return {name: _cut(one, length, first) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_cut(one, length, first) for one in value)
    if isinstance(value, torch.Tensor):
        if value.ndim > 1 and value.shape[1] == length:
            return value[:, first:]
        if value.ndim == 1 and len(value) == length:
            return value[first:]
    return value


@dataclass(frozen=True)
class Suffix:
    """A prompt's last positions, which can be run again from any layer on.

    first: the first of them. inputs: of ``record_inputs``.
    """

    model: PreTrainedModel
    recorded: Recorded
    first: int
    inputs: list[tuple]

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder's."""
        return decoder_layers(self.model)

    def run(self, hidden: torch.Tensor, layer: int, attention: LayerAttention) -> torch.Tensor:
        """Run one layer on hidden states [S, hidden]."""
        _, others, named = self.inputs[layer]
        out = self.layers[layer](hidden[None], *others, **named, kascade=attention)
        return (out[0] if isinstance(out, tuple) else out)[0]

    def finish(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """Run the layers from ``layer`` on and the last norm: float32 [S, hidden]."""
        for number in range(layer, len(self.inputs)):
            hidden = self.run(hidden, number, SuffixAttention(self.recorded, self.first))
        return last_norm(self.model)(hidden).float()


class Borrowed(NamedTuple):
    """Positions, ascending, and what they attend to: keys int64 [H_i, count] that a layer selected
    for each, of which head h takes those of head ``head_map[h]``."""

    rows: Sequence[int]
    selected: Sequence[torch.Tensor]
    head_map: torch.Tensor


class SuffixAttention:
    """Attention of the suffix, dense but for the rows that borrow keys.

    Keys and values before the suffix are the recorded ones.
    """

    def __init__(self, recorded: Recorded, first: int, borrowed: Borrowed | None = None) -> None:
        self._recorded, self._first, self._borrowed = recorded, first, borrowed

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return self.limited(layer, q, k, v, scale, Limits())

    def limited(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        limits: Limits,
    ) -> torch.Tensor:
        """Attend in a layer with a window or soft-capped logits."""
        k = torch.cat([self._recorded.keys[layer][: self._first], k])
        v = torch.cat([self._recorded.values[layer][: self._first], v])
        if limits == Limits():
            out = dense_attention(q, k, v, scale)
        else:
            out = limited_attention(q, k, v, scale, limits)
        return out if self._borrowed is None else self._borrow(out, q, k, v, scale, limits.softcap)

    def _borrow(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        out = out.clone()
        rows, selected, head_map = self._borrowed
        for row, keys in zip(rows, selected, strict=True):
            own = torch.arange(TILE * tile_of(row), row + 1, device=q.device)
            query = slice(row - self._first, row - self._first + 1)
            arguments = (q[query], k, v, keys[head_map].to(q.device), own, scale)
            if softcap is None:
                out[query] = sparse_attention(*arguments)
            else:
                out[query] = capped_sparse_attention(*arguments, softcap)
        return out


def select_for_rows(
    recorded: Recorded, layer: int, queries: torch.Tensor, rows: Sequence[int], budget: Budget
) -> list[torch.Tensor]:
    """Keys that a layer selects for each row, as one decoding step would: int64 [H, count] each.

    queries: [R, Hq, D], the rows' in that layer.
    """
    k, scale, softcap = recorded.keys[layer], recorded.scales[layer], recorded.softcaps.get(layer)
    selected = []
    for row, q in zip(rows, queries, strict=True):
        scores = layer_scores(q[None], k[: row + 1], scale, softcap)
        selected.append(select_topk(scores, budget.selected(tile_of(row))))
    return selected


def borrowing_errors(
    suffix: Suffix,
    queries: dict[int, torch.Tensor],
    rows: Sequence[int],
    layers: Sequence[int],
    head_maps: torch.Tensor,
    budget: Budget,
    end: torch.Tensor,
    on_pair: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Error of the last hidden state when layer j alone borrows layer i's keys: [M, M], float64.

    queries: by layer, [R, Hq, D] of the rows. layers: those measured, M of them. head_maps:
    [M, M, H], the head of layer i whose keys a head of layer j takes. end: [L, hidden], what the
    model gave. An error is the squared distance over the squared length, the mean over rows;
    entries with i > j are 0, as is that of the first layer with itself, which attends densely.
    Raises CalibrationError where running the suffix again gives another result than the model.
    """
    places = [row - suffix.first for row in rows]
    # Errors are against a replay too: in low precision it differs a little from the model.
    try:
        expected = suffix.finish(suffix.inputs[0][0], 0)[places]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CalibrationError(
            f"model: {type(suffix.model).__name__}'s layers cannot be run one by one ({error}); "
            "--criterion mass does not run them"
        ) from error
    distance = relative_error(end[list(rows)].float().to(expected.device), expected)
    if not distance < _REPLAY_TOLERANCE:
        raise CalibrationError(
            f"model: {type(suffix.model).__name__}'s layers, run one by one, give another result "
            f"than the model (squared relative distance {distance:.3g}); --criterion mass does "
            "not run them"
        )
    errors = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for i, anchor in enumerate(layers):
        selected = select_for_rows(suffix.recorded, anchor, queries[anchor], rows, budget)
        for j in range(i, len(layers)):
            if j > 0:
                layer, borrowed = layers[j], Borrowed(rows, selected, head_maps[i, j])
                attention = SuffixAttention(suffix.recorded, suffix.first, borrowed)
                changed = suffix.run(suffix.inputs[layer][0], layer, attention)
                found = suffix.finish(changed, layer + 1)[places]
                errors[i, j] = relative_error(found, expected)
            on_pair()
    return errors


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Squared distance over squared length of rows [R, hidden], the mean over rows."""
    distance = (found - expected).double().square().sum(-1)
    return float((distance / expected.double().square().sum(-1)).mean())
