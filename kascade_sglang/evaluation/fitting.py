"""Making a prompt as long as it may be."""

from collections.abc import Callable
from dataclasses import dataclass

from kascade_sglang.evaluation.errors import EvaluationError

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
    Returns the draft and its tokens. Raises EvaluationError where the smallest is too long.
    """

    def measured(size: int) -> tuple[Draft, int]:
        draft = build(size)
        return draft, count(draft.prompt) + count(draft.prefix)

    low, best = smallest, measured(smallest)
    if best[1] > budget:
        raise EvaluationError(f"the shortest prompt has {best[1]} tokens, {budget} are left for it")
    start, high = best[1], None
    slope = max(measured(2 * smallest)[1] - start, 1) / smallest
    for step in range(40):
        if high == low + 1 or budget - best[1] <= max(CLOSE * budget, 1):
            break
        guess = low + max(1, int((budget - best[1]) / slope))
        if high is not None:
            # Halving now and then, for sizes that are not proportional.
            guess = (low + high) // 2 if step % 3 == 2 else min(guess, high - 1)
        made = measured(guess)
        if made[1] <= budget:
            low, best = guess, made
        else:
            high = guess
        slope = max(made[1] - start, 1) / max(guess - smallest, 1)
    return best
