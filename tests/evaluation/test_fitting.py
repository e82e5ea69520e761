"""The search for a prompt's size, where the material may end before the budget does."""

import pytest

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.fitting import CLOSE, Draft, longest


def build(size: int, most: int, fixed: int) -> Draft:
    """``fixed`` words and pieces of 7 to 13; no more than ``most`` pieces."""
    if size > most:
        raise EvaluationError(f"{most} pieces are too few")
    pieces = ["x " * (7 + 5 * piece % 7) for piece in range(size)]
    return Draft("x " * fixed + "".join(pieces), "", ())


def tokens(size: int, fixed: int) -> int:
    return len(build(size, size, fixed).prompt.split())


def fit(most: int, budget: int, fixed: int, smallest: int = 1) -> int:
    made = longest(
        lambda size: build(size, most, fixed), lambda text: len(text.split()), budget, smallest
    )
    assert made[1] == len(made[0].prompt.split())
    return made[1]


@pytest.mark.parametrize("fixed", [0, 40, 400])
@pytest.mark.parametrize("smallest", [1, 5])
@pytest.mark.parametrize("most", [5, 6, 9, 11, 28, 400])
def test_all_that_fits_is_used_up_to_the_last_piece(most: int, smallest: int, fixed: int) -> None:
    for size in {smallest, smallest + 1, most // 2, most - 1, most}:
        if smallest <= size <= most:
            wanted = tokens(size, fixed)
            for budget in (wanted, wanted + 6):
                assert fit(most, budget, fixed, smallest) >= wanted - max(CLOSE * budget, 1)


@pytest.mark.parametrize("fixed", [0, 40])
@pytest.mark.parametrize("most", [1, 2, 28, 400])
def test_material_that_ends_early_is_refused(most: int, fixed: int) -> None:
    for budget in (2 * tokens(most, fixed) + 20, 100 * tokens(most, fixed)):
        with pytest.raises(EvaluationError, match=f"^{most} pieces are too few$"):
            fit(most, budget, fixed)


def test_the_smallest_must_be_there_and_fit() -> None:
    with pytest.raises(EvaluationError, match="^0 pieces are too few$"):
        fit(0, 100, 0)
    with pytest.raises(EvaluationError, match="^the shortest prompt has 47 tokens, 46 are left"):
        fit(9, 46, 40)
