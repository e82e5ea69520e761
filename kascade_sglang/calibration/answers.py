"""What a model answers where its layers select keys and borrow them, all of them together.

Recovered attention mass says how much of a layer's attention other keys keep, not whether what is
lost matters; and what one layer loses, later ones may mend or double. So the positions of a prompt
at which the model answers are run again, sparse in every layer, over the keys of a dense pass, and
the loss is the divergence of what they predict.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kascade_kernels.budget import Budget, tile_of
from kascade_sglang.calibration.hf_attention import DenseAttention, LayerCall, our_attention
from kascade_sglang.calibration.hf_model import decoder_layers, input_ids, next_tokens
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.calibration.rows import Lists, attend_rows, select_keys
from kascade_sglang.errors import CalibrationError

MOST_ROWS = 48
"""Positions of a prompt at which the loss is measured."""
_CHECKED_ROWS = 4
_TOLERANCE = 0.01
"""Loss, in nats, of running layers again that leave no key out; low precision rounds."""
_NOT_KEPT = ("hidden_states", "kascade")

Select = Callable[[LayerCall, torch.Tensor, Budget, bool], Lists]
"""How an anchor's rows select: ``select_keys``, or what takes and returns the same."""


def reply_rows(prompt: Prompt, budget: Budget) -> list[int]:
    """Positions whose output is a token of a reply, ascending, MOST_ROWS spread over all of them.

    Those whose budget covers every key lose nothing, whoever selects, and are left out.
    """
    rows = [at - 1 for begin, end in prompt.replies for at in range(max(begin, 1), end)]
    return _spread(rows, budget)


def answering_rows(prompt: Prompt, budget: Budget) -> list[int]:
    """Positions at which the loss is measured: of replies, or of the whole without any."""
    return reply_rows(prompt, budget) or _spread(range(len(prompt.ids)), budget)


def _spread(rows: Iterable[int], budget: Budget) -> list[int]:
    sparse = [row for row in rows if not budget.is_dense(tile_of(row))]
    count = min(MOST_ROWS, len(sparse))
    return [sparse[place * len(sparse) // count] for place in range(count)]


@dataclass(frozen=True)
class Answers:
    """R rows of one prompt of L tokens, which can be run again from any layer on.

    rows: int64 [R], ascending positions. inputs: for every layer, the hidden states [R, hidden]
    that it is called with in a dense pass. calls: its other arguments, at the rows. keys, values:
    for every layer, [L, H, D] in the host's memory. logprobs: float32 [R, vocabulary] of the next
    token, in a dense pass.
    """

    model: PreTrainedModel
    rows: torch.Tensor
    inputs: list[torch.Tensor]
    calls: list[tuple[tuple, dict[str, Any]]]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    logprobs: torch.Tensor

    def loss(self, hidden: torch.Tensor) -> float:
        """Return the divergence of what the last layer returns, [R, hidden]."""
        return self.divergence(next_tokens(self.model, hidden))

    def divergence(self, logits: torch.Tensor) -> float:
        """KL divergence in nats of the next token, from dense to ``logits`` [R, vocabulary]: the
        mean over rows."""
        found = logits.float().log_softmax(-1)
        expected = self.logprobs.to(found.device)
        return float((expected.exp() * (expected - found)).double().sum(-1).mean())

    def last(self, count: int) -> "Answers":
        """Return the last rows alone."""
        some, length = slice(-count, None), len(self.rows)
        return Answers(
            self.model,
            self.rows[some],
            [hidden[some] for hidden in self.inputs],
            [_at(call, torch.arange(length)[some], length) for call in self.calls],
            self.keys,
            self.values,
            self.logprobs[some],
        )


class _KeepKeys(DenseAttention):
    """Dense attention that keeps every layer's keys and values, in the host's memory."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Keep, then attend; layers come in their order."""
        self.keys.append(call.k.cpu())
        self.values.append(call.v.cpu())
        return super().attend(call)


@torch.inference_mode()
def answers_of(model: PreTrainedModel, prompt: Prompt, rows: Sequence[int]) -> Answers:
    """Run a prompt densely and keep what running its rows again takes.

    Raises CalibrationError for models whose layers pass other than [1, tokens, hidden] on.
    """
    kept, at = _KeepKeys(), torch.tensor(rows)
    ids = input_ids(model, prompt.ids)
    with our_attention(model), _record_inputs(decoder_layers(model), at) as found:
        logits = model(ids, use_cache=False, logits_to_keep=at, kascade=kept).logits[0]
    inputs, calls = [hidden for hidden, _ in found], [call for _, call in found]
    logprobs = logits.float().log_softmax(-1)
    return Answers(model, at, inputs, calls, kept.keys, kept.values, logprobs)


@contextmanager
def _record_inputs(
    layers: Sequence[nn.Module], rows: torch.Tensor
) -> Iterator[list[tuple[torch.Tensor, tuple[tuple, dict[str, Any]]]]]:
    """Within the block, a forward pass keeps what each layer is called with, at the rows."""
    found: list = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.ndim != 3 or hidden.shape[0] != 1:
            raise CalibrationError(
                f"model: expected layers that pass [1, tokens, hidden] on, got "
                f"{list(hidden.shape)}; --criterion mass does not run them one by one"
            )
        length = hidden.shape[1]
        others = {name: value for name, value in kwargs.items() if name not in _NOT_KEPT}
        found.append((hidden[0, rows].clone(), _at((args[1:], others), rows, length)))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _at(value: Any, rows: torch.Tensor, length: int) -> Any:
    """Take the rows of all that has one entry a token: [1, L, ...], [L], and what holds them."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 1 and len(value) == length:
            return value[rows.to(value.device)]
        if value.ndim > 1 and value.shape[1] == length:
            return value[:, rows.to(value.device)]
        return value
    if isinstance(value, dict):
        return {name: _at(one, rows, length) for name, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_at(one, rows, length) for one in value)
    return value


class Selecting(NamedTuple):
    """How layers select and borrow.

    layers: those with full attention, M of them, ascending; the first attends densely.
    head_maps: int64 [M, M, H], the head of the i-th layer whose keys a head of the j-th takes.
    pooled: whether all heads of a layer take the same keys.
    """

    layers: tuple[int, ...]
    head_maps: torch.Tensor
    budget: Budget
    pooled: bool = False


class _RowsAttention(DenseAttention):
    """Attention of rows in one layer, over keys and values of the whole prompt.

    lists: what the rows attend to beside their own tile. None selects by the layer's own queries
    and keys, and leaves that here.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        states: tuple,
        how: Selecting,
        lists: Lists | None,
        select: Select,
    ) -> None:
        self._rows, self._states, self._how, self.lists = rows, states, how, lists
        self._select = select

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Put the rows' own keys and values in their places, then attend."""
        (k, v), how = self._states, self._how
        rows = self._rows.to(k.device)
        k[rows], v[rows] = call.k, call.v
        call = call._replace(k=k, v=v)
        if self.lists is None and call.layer in how.layers:
            self.lists = self._select(call, rows, how.budget, how.pooled)
        return attend_rows(call, rows, self.lists)


class SparseAnswers:
    """A prompt's rows, sparse in all layers; what was run for the last anchors is kept."""

    def __init__(self, answers: Answers, how: Selecting) -> None:
        self._answers, self._how = answers, how
        self._inputs = list(answers.inputs)
        self._lists: dict[int, Lists] = {}  # of the anchors
        self._anchors: tuple[int, ...] = ()
        self._loss = 0.0
        self._states: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Within the block, keys and values are where the layers are."""
        found = self._answers
        self._states = [
            (k.to(hidden.device), v.to(hidden.device))
            for k, v, hidden in zip(found.keys, found.values, found.inputs, strict=True)
        ]
        try:
            with torch.inference_mode(), our_attention(found.model):
                yield
        finally:
            self._states = []

    def keep(self, anchors: tuple[int, ...]) -> float:
        """Run under these anchors, keep what comes of it, and return the loss."""
        if anchors != self._anchors:
            changed = set(anchors) ^ set(self._anchors)
            start = min(changed) if self._anchors else self._how.layers[0]
            self._inputs[start:], self._lists, self._loss = self._run(anchors, start)
            self._anchors = anchors
        return self._loss

    def loss_without(self, layer: int) -> float:
        """Return the loss under the anchors that are kept, but for one."""
        anchors = tuple(anchor for anchor in self._anchors if anchor != layer)
        return self._run(anchors, layer)[2]

    def loss_where(self, select: Select) -> float:
        """Return the loss under the anchors that are kept, where they select another way."""
        return self._run(self._anchors, self._how.layers[0], select)[2]

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        return len(self._answers.inputs)

    def _run(
        self, anchors: tuple[int, ...], start: int, select: Select = select_keys
    ) -> tuple[list[torch.Tensor], dict[int, Lists], float]:
        """Run the layers from ``start`` on: their inputs, the anchors' lists, the loss."""
        found, layers = self._answers, decoder_layers(self._answers.model)
        lists = {anchor: kept for anchor, kept in self._lists.items() if anchor < start}
        hidden, inputs = self._inputs[start], []
        for number in range(start, len(layers)):
            inputs.append(hidden)
            borrowed = self._borrowed(number, anchors, lists)
            attention = _RowsAttention(
                found.rows, self._states[number], self._how, borrowed, select
            )
            others, named = found.calls[number]
            out = layers[number](hidden[None], *others, **named, kascade=attention)
            hidden = (out[0] if isinstance(out, tuple) else out)[0]
            if number in anchors:
                lists[number] = attention.lists
            if number == self._how.layers[0]:  # attends densely, as in the dense pass
                hidden = found.inputs[number + 1] if number + 1 < len(layers) else hidden
        return inputs, lists, found.loss(hidden)

    def _borrowed(
        self, layer: int, anchors: tuple[int, ...], lists: dict[int, Lists]
    ) -> Lists | None:
        """Lists of the anchor that a layer borrows from; None where it selects or has a window."""
        how = self._how
        if layer in anchors or layer not in how.layers:
            return None
        anchor = max(one for one in anchors if one < layer)
        heads = how.head_maps[how.layers.index(anchor), how.layers.index(layer)]
        return lists[anchor].of_heads(heads, self._states[layer][0].device)


def check_answers(answers: Answers, how: Selecting) -> None:
    """Refuse a model that answers otherwise where its layers run again and leave no key out."""
    name = type(answers.model).__name__
    tried = SparseAnswers(answers.last(_CHECKED_ROWS), how._replace(budget=Budget(1.0)))
    try:
        with tried.loaded():
            loss = tried.keep(how.layers)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CalibrationError(
            f"model: {name}'s layers cannot be run one by one ({error}); --criterion mass does "
            "not run them"
        ) from error
    if not loss < _TOLERANCE:
        raise CalibrationError(
            f"model: {name}'s layers, run one by one, give another answer than the model (it "
            f"diverges by {loss:.3g} nats); --criterion mass does not run them"
        )
