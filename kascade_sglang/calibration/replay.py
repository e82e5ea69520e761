"""What happens to a model's answers when one layer attends to keys that an earlier layer selected.

Recovered attention mass says how much of a layer's attention other keys keep, not whether what is
lost matters. So a prompt is run once more for every pair of layers: one layer borrows keys, as it
would when it is served, the layers after it go on as they are, and the error is what has become
of the last hidden state where the model answers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.reference import select_topk
from kascade_sglang.calibration.hf_attention import DenseAttention, LayerAttention, LayerCall
from kascade_sglang.calibration.hf_model import decoder_layers, last_norm
from kascade_sglang.calibration.limited_attention import layer_scores
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.calibration.spans import KeyLists, Span, alike, attend_to_lists, key_lists
from kascade_sglang.errors import CalibrationError

MOST_ROWS = 128
"""Positions of a prompt at which errors are measured, the last ones."""
_REPLAY_TOLERANCE = 0.01
"""Squared relative distance of a replay that changes nothing from the model, in low precision."""


def reply_rows(prompt: Prompt, budget: Budget) -> list[int]:
    """Positions whose output is a token of a reply, ascending, at most the last MOST_ROWS.

    Those whose budget covers every key lose nothing, whoever selects, and are left out.
    """
    rows = [at - 1 for begin, end in prompt.replies for at in range(max(begin, 1), end)]
    return _sparse(rows, budget)[-MOST_ROWS:]


def answering_rows(prompt: Prompt, budget: Budget) -> list[int]:
    """Positions at which errors are measured: of replies, or a prompt's last ones without any."""
    last = range(len(prompt.ids))[-MOST_ROWS:]
    return reply_rows(prompt, budget) or _sparse(last, budget)


def _sparse(rows: Iterable[int], budget: Budget) -> list[int]:
    return [row for row in rows if not budget.is_dense(tile_of(row))]


_NOT_KEPT = ("hidden_states", "kascade")


@contextmanager
def record_inputs(layers: Sequence[nn.Module]) -> Iterator[list[tuple]]:
    """Within the block, a forward pass keeps what each layer is called with.

    Yields a list that fills with (hidden states [L, hidden], other positional arguments, named
    ones). Raises CalibrationError for hidden states that are not [1, L, hidden].
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
        found.append((hidden[0].clone(), args[1:], others))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Replay:
    """A prompt that can be run again from any layer on. inputs: of ``record_inputs``."""

    model: PreTrainedModel
    inputs: list[tuple]

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder's."""
        return decoder_layers(self.model)

    def run(self, layer: int, attention: LayerAttention) -> torch.Tensor:
        """Run one layer on its input: hidden states [L, hidden]."""
        return self._run(self.inputs[layer][0], layer, attention)

    def finish(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """Run the layers from ``layer`` on and the last norm: float32 [L, hidden]."""
        for number in range(layer, len(self.inputs)):
            hidden = self._run(hidden, number, DenseAttention())
        return last_norm(self.model)(hidden).float()

    def _run(self, hidden: torch.Tensor, layer: int, attention: LayerAttention) -> torch.Tensor:
        _, others, named = self.inputs[layer]
        out = self.layers[layer](hidden[None], *others, **named, kascade=attention)
        return (out[0] if isinstance(out, tuple) else out)[0]


class SelectingAttention(DenseAttention):
    """Dense attention that also selects keys for spans: ``lists``, some spans each."""

    def __init__(self, spans: Sequence[Span], budget: Budget) -> None:
        self._spans, self._budget = spans, budget
        self.lists: list[KeyLists] = []

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Select by the layer's own queries and keys."""
        # Attending to lists together takes no more than scoring one tile.
        for spans in alike(self._spans, self._budget, TILE * len(call.k)):
            selected = []
            for begin, end in spans:
                queries, keys = call.q[begin:end], call.k[:end]
                scores = layer_scores(queries, keys, call.scale, call.limits.softcap)
                selected.append(select_topk(scores, self._budget.selected(tile_of(begin))))
            self.lists.append(key_lists(spans, selected))
        return super().attend(call)


class BorrowingAttention(DenseAttention):
    """Dense attention but for spans, which attend to keys that another layer selected.

    lists: of ``SelectingAttention``; head h takes those of head ``head_map[h]``.
    """

    def __init__(self, lists: Sequence[KeyLists], head_map: torch.Tensor) -> None:
        self._lists, self._head_map = lists, head_map

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Attend; spans to their keys and, causally, to the own ones of their tile."""
        out = super().attend(call)
        _, q, k, v, scale, limits = call
        for lists in self._lists:
            taken = lists.of_heads(self._head_map, q.device)
            out[taken.queries] = attend_to_lists(q, k, v, taken, scale, limits.softcap)
        return out


def borrowing_errors(
    replay: Replay,
    spans: Sequence[Span],
    rows: Sequence[int],
    layers: Sequence[int],
    head_maps: torch.Tensor,
    budget: Budget,
    end: torch.Tensor,
    on_layers: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """Error of the last hidden state when layer j alone borrows layer i's keys: [M, M], float64.

    spans: where it borrows. rows: where errors are measured. layers: those measured, M of them.
    head_maps: [M, M, H], the head of layer i whose keys a head of layer j takes. end: [L, hidden],
    what the model gave. An error is the squared distance over the squared length, the mean over
    rows; entries with i > j are 0, as is that of the first layer with itself, which attends
    densely. on_layers: called after every pair with how many layers run for one of its kind.
    Raises CalibrationError where running the layers again gives another result than the model.
    """
    rows = list(rows)
    expected = _unchanged(replay, rows, end)
    errors = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for i, anchor in enumerate(layers):
        selecting = SelectingAttention(spans, budget)
        replay.run(anchor, selecting)
        for j in range(i, len(layers)):
            if j > 0:
                attention = BorrowingAttention(selecting.lists, head_maps[i, j])
                changed = replay.run(layers[j], attention)
                found = replay.finish(changed, layers[j] + 1)[rows]
                errors[i, j] = relative_error(found, expected)
            on_layers(len(replay.inputs) - layers[j])
    return errors


def _unchanged(replay: Replay, rows: list[int], end: torch.Tensor) -> torch.Tensor:
    """Return the last hidden state at rows when nothing borrows. Errors are against it, because
    in low precision it differs a little from ``end``, the model's."""
    try:
        found = replay.finish(replay.inputs[0][0], 0)[rows]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CalibrationError(
            f"model: {type(replay.model).__name__}'s layers cannot be run one by one ({error}); "
            "--criterion mass does not run them"
        ) from error
    distance = relative_error(end[rows].float().to(found.device), found)
    if not distance < _REPLAY_TOLERANCE:
        raise CalibrationError(
            f"model: {type(replay.model).__name__}'s layers, run one by one, give another result "
            f"than the model (squared relative distance {distance:.3g}); --criterion mass does "
            "not run them"
        )
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Squared distance over squared length of rows [R, hidden], the mean over rows."""
    distance = (found - expected).double().square().sum(-1)
    return float((distance / expected.double().square().sum(-1)).mean())
