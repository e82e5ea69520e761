"""Making a prompt as long as it may be."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.samples import Order, Sample

CLOSE = 0.005
"""Share of the budget that may stay unused; closing in further costs more than it tells."""


@dataclass(frozen=True)
class Draft:
    """A prompt of some size: the text, the prescribed start of its reply, and the answers."""

    prompt: str
    prefix: str
    answers: tuple[str, ...]


def longest(
    build: Callable[[int], Draft], count: Callable[[str], int], budget: int, smallest: int
) -> tuple[Draft, int]:
    """The draft of the largest size whose prompt and prefix have at most ``budget`` tokens.

    build: size -> draft; about proportional, and the same draft for the same size.
    Returns the draft and its tokens. Raises EvaluationError where the smallest is too long, and
    ``build``'s own where the material for larger ones ends before the budget does.
    """

    def measured(size: int) -> tuple[Draft, int]:
        draft = build(size)
        return draft, count(draft.prompt) + count(draft.prefix)

    low, best = smallest, measured(smallest)
    if best[1] > budget:
        raise EvaluationError(f"the shortest prompt has {best[1]} tokens, {budget} are left for it")
    start, high = best[1], None
    lack: EvaluationError | None = None  # why ``high`` could not be built
    slope = start / smallest
    try:
        slope = max(measured(2 * smallest)[1] - start, 1) / smallest
    except EvaluationError as error:
        high, lack = 2 * smallest, error
    for step in range(40):
        if high == low + 1 or budget - best[1] <= max(CLOSE * budget, 1):
            break
        guess = low + max(1, int((budget - best[1]) / slope))
        if high is not None:
            # Halving now and then, for sizes that are not proportional.
            halve = step % 3 == 2 or (lack is not None and guess >= high)
            guess = (low + high) // 2 if halve else min(guess, high - 1)
        try:
            made = measured(guess)
        except EvaluationError as error:
            high, lack = guess, error
            continue
        if made[1] <= budget:
            low, best = guess, made
        else:
            high, lack = guess, None
        slope = max(made[1] - start, 1) / max(guess - smallest, 1)
    if lack is not None and budget - best[1] > max(CLOSE * budget, slope):
        raise lack
    return best


def fitted_sample(
    task: str,
    build: Callable[[int], Draft],
    metric: Callable[..., float],
    max_tokens: int,
    smallest: int,
    order: Order,
) -> Sample:
    """The sample whose prompt, template and longest reply have just under ``order.length`` tokens.

    metric: (reply, answers=...) -> 0 to 1. Raises EvaluationError, naming task and length, where
    nothing fits.
    """
    budget = order.length - order.tokens.overhead - max_tokens
    try:
        draft, tokens = longest(build, order.tokens.count, budget, smallest)
    except EvaluationError as error:
        raise EvaluationError(f"{task} at {order.length} tokens: {error}") from error
    score = partial(metric, answers=draft.answers)
    return Sample(draft.prompt, draft.answers, tokens, max_tokens, score, prefix=draft.prefix)
