"""Which anchors do with a candidate pool: those whose answers do not miss the other keys."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kascade_kernels.budget import Budget, PoolRule
from kascade_sglang.calibration.answers import MOST_ROWS, Selecting, SparseAnswers
from kascade_sglang.calibration.elimination import OnWork
from kascade_sglang.calibration.hf_attention import LayerCall
from kascade_sglang.calibration.rows import Lists, best_keys, score_keys

AUTO = "auto"
"""``--makers`` that are to be chosen."""
TOLERATED = 1.1
"""Loss of pooled anchors over that of the same anchors where all score every key."""
USUAL = 10
"""Anchors that a plan has, where nobody knows yet how many."""


class PoolChoice(NamedTuple):
    """Makers, and the loss of answers in nats where the anchors after them score their pools."""

    makers: tuple[int, ...]
    objective: float


class Pools:
    """Selection of anchors for one run through the layers; takes ``select_keys``'s arguments.

    makers: anchors that leave a pool of ``rule``'s size, which the anchors after them score.
    """

    def __init__(self, how: Selecting, makers: tuple[int, ...], rule: PoolRule) -> None:
        self._how, self._makers, self._rule = how, makers, rule
        self._made: tuple[int, torch.Tensor] | None = None

    def __call__(self, call: LayerCall, rows: torch.Tensor, budget: Budget, pooled: bool) -> Lists:
        """Select from all keys, or from the last maker's pool."""
        making = call.layer in self._makers
        pool = None if making or self._made is None else self._lent(*self._made, call.layer)
        score = score_keys(call, rows, pooled, pool)
        if making:
            self._made = call.layer, _inside(score, best_keys(score, rows, budget, self._rule))
        return best_keys(score, rows, budget)

    def _lent(self, maker: int, pool: torch.Tensor, layer: int) -> torch.Tensor:
        """A maker's pool [R, H, L] as the heads of a layer see it."""
        layers = self._how.layers
        heads = self._how.head_maps[layers.index(maker), layers.index(layer)]
        return pool[:, heads.to(pool.device)]


def _inside(score: torch.Tensor, lists: Lists) -> torch.Tensor:
    """Whether keys are on lists: bool, of the scores' shape [R, H, L]."""
    taken = torch.arange(lists.keys.shape[2], device=score.device) < lists.counts[:, None]
    inside = torch.zeros_like(score, dtype=torch.bool)
    return inside.scatter_(2, lists.keys, taken[:, None].expand_as(lists.keys))


def makers_of(anchors: Sequence[int], pooled: set[int]) -> tuple[int, ...]:
    """Return the makers of a plan whose pooled anchors these are: all others, from the first that
    is followed by one."""
    if not pooled:
        return ()
    first = anchors[anchors.index(min(pooled)) - 1]
    return tuple(one for one in anchors if one not in pooled and one >= first)


def losses_of(
    prompts: Sequence[SparseAnswers],
    how: Selecting,
    anchors: tuple[int, ...],
    tried: Sequence[tuple[int, ...]],
    rule: PoolRule,
    on_work: OnWork = lambda work: None,
    row_work: float = MOST_ROWS,
) -> list[float]:
    """Return the loss under these anchors for each of the makers tried, the mean over prompts."""
    losses = [0.0] * len(tried)
    for prompt in prompts:
        with prompt.loaded():
            prompt.keep(anchors)
            for place, makers in enumerate(tried):
                losses[place] += prompt.loss_where(Pools(how, makers, rule)) / len(prompts)
                on_work(row_work * prompt.depth)
    return losses


def choose_makers(
    prompts: Sequence[SparseAnswers],
    how: Selecting,
    anchors: tuple[int, ...],
    rule: PoolRule,
    on_work: OnWork = lambda work: None,
    row_work: float = MOST_ROWS,
) -> list[PoolChoice]:
    """Pool one anchor after another, each time the one that is missed least, while little is lost.

    on_work: called with shares of ``work_of``. row_work: that of running a prompt's rows through
    one layer.
    Returns a choice for every number of pooled anchors, none first; the last loses too much where
    not all but the first anchor are pooled. Among equals the lower layer is pooled first.
    """
    pooled: set[int] = set()
    choices = [PoolChoice((), *losses_of(prompts, how, anchors, [()], rule))]
    while len(pooled) < len(anchors) - 1:
        left = [anchor for anchor in anchors[1:] if anchor not in pooled]
        tried = [makers_of(anchors, pooled | {anchor}) for anchor in left]
        losses = losses_of(prompts, how, anchors, tried, rule, on_work, row_work)
        least, anchor, makers = min(zip(losses, left, tried, strict=True))
        pooled.add(anchor)
        choices.append(PoolChoice(makers, least))
        if not is_good(choices[-1], choices):
            break
    return choices


def work_of(
    prompts: int, anchors: int | tuple[int, ...] | None, depth: int, row_work: float
) -> float:
    """Most work of ``choose_makers``, in layers times tokens of a dense pass."""
    count = len(anchors) if isinstance(anchors, tuple) else anchors or USUAL
    return prompts * depth * row_work * count * (count - 1) / 2


def is_good(choice: PoolChoice, choices: Sequence[PoolChoice]) -> bool:
    """Whether a choice loses little more than where every anchor scores all keys."""
    return choice.objective <= TOLERATED * choices[0].objective


def most_pooled(choices: Sequence[PoolChoice]) -> PoolChoice:
    """Return the choice with most pooled anchors of those that lose little."""
    return [one for one in choices if is_good(one, choices)][-1]
