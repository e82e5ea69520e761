"""Which layers to keep as anchors: those that the model's answers would miss most."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from kascade_sglang.calibration.anchors import AnchorChoice
from kascade_sglang.calibration.answers import (
    MOST_ROWS,
    Selecting,
    SparseAnswers,
    answering_rows,
    answers_of,
    check_answers,
)
from kascade_sglang.calibration.prompts import Prompt

TRIED = 8
"""Anchors that a round tries to do without, after the first, which tries every one: those whose
loss was least when they were last tried."""
TOLERATED = 2.0
"""Loss of anchors that nobody has counted, over that of a model whose layers all select."""
FEWEST = 3
"""Anchors that the last round leaves, unless fewer are asked for; the paper names five."""

OnWork = Callable[[float], object]


def run_densely(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    how: Selecting,
    on_work: OnWork = lambda work: None,
) -> list[SparseAnswers]:
    """Run prompts densely, and return them for trials of anchors.

    on_work: called with shares of ``work_of``.
    Raises CalibrationError for models whose layers cannot be run one by one.
    """
    sparse = []
    for prompt in prompts:
        answers = answers_of(model, prompt, answering_rows(prompt, how.budget))
        if not sparse:
            check_answers(answers, how)
        sparse.append(SparseAnswers(answers, how))
        on_work(len(prompt.ids) * sparse[0].depth)
    return sparse


def choose(
    sparse: Sequence[SparseAnswers],
    layers: tuple[int, ...],
    anchors: int | tuple[int, ...] | None,
    on_work: OnWork = lambda work: None,
    row_work: float = MOST_ROWS,
) -> list[AnchorChoice]:
    """Return anchors and their losses in nats, the mean over prompts, all layers first.

    layers: those with full attention. anchors: how many are wanted, which, or None.
    on_work: called with shares of ``work_of``. row_work: that of running a prompt's rows through
    one layer.
    """
    if isinstance(anchors, tuple):
        return [AnchorChoice(one, _loss(sparse, one)) for one in (layers, anchors)]
    fewest = FEWEST if anchors is None else min(FEWEST, anchors)
    depth = sparse[0].depth
    return eliminate(sparse, layers, fewest, lambda layer: on_work(row_work * (depth - layer)))


def work_of(lengths: Sequence[int], layers: Sequence[int], depth: int, row_work: float) -> float:
    """Work of ``choose`` that counts anchors, in layers times tokens of a dense pass."""
    rounds = range(len(layers), FEWEST, -1)
    trials = sum(left - 1 if left == len(layers) else min(TRIED, left - 1) for left in rounds)
    return sum(lengths) * depth + len(lengths) * row_work * trials * depth / 2


def _loss(prompts: Sequence[SparseAnswers], anchors: tuple[int, ...]) -> float:
    """Run prompts under these anchors and keep what comes of it."""
    total = 0.0
    for prompt in prompts:
        with prompt.loaded():
            total += prompt.keep(anchors)
    return total / len(prompts)


def eliminate(
    prompts: Sequence[SparseAnswers],
    layers: Sequence[int],
    fewest: int = FEWEST,
    on_trial: Callable[[int], object] = lambda layer: None,
) -> list[AnchorChoice]:
    """Take away the anchor that is missed least, until ``fewest`` are left.

    layers: those with full attention, all of them anchors at first; the first stays one.
    on_trial: called with a layer after every prompt that has done without it.
    Returns a choice for every count, the most anchors first. Among equals the lower layer goes.
    """
    anchors, missed = tuple(layers), dict.fromkeys(layers[1:], 0.0)
    choices = [AnchorChoice(anchors, _loss(prompts, anchors))]
    while len(anchors) > max(1, fewest):
        going = sorted(missed, key=missed.__getitem__)
        going = going if len(choices) == 1 else going[:TRIED]
        without = dict.fromkeys(going, 0.0)
        for prompt in prompts:
            with prompt.loaded():
                prompt.keep(anchors)
                for layer in going:
                    without[layer] += prompt.loss_without(layer) / len(prompts)
                    on_trial(layer)
        missed |= without
        least = min(going, key=lambda layer: (without[layer], layer))
        del missed[least]
        anchors = tuple(anchor for anchor in anchors if anchor != least)
        choices.append(AnchorChoice(anchors, without[least]))
    return choices


def chosen(choices: Sequence[AnchorChoice], anchors: int | tuple[int, ...] | None) -> AnchorChoice:
    """Return the choice that was asked for, of those of ``choose``."""
    if anchors is None:
        return fewest_good(choices)
    return next(one for one in choices if anchors in (one.anchors, len(one.anchors)))


def fewest_good(choices: Sequence[AnchorChoice]) -> AnchorChoice:
    """Return the fewest anchors that lose at most TOLERATED times what all layers lose.

    choices: of ``choose``. What all layers lose is what selection itself costs.
    """
    bound = TOLERATED * choices[0].objective
    good = [choice for choice in choices if choice.objective <= bound]
    return min(good, key=lambda choice: len(choice.anchors))
