"""Which anchors are taken away, and how many are left."""

from contextlib import nullcontext

import pytest

from kascade_sglang.calibration.anchors import AnchorChoice
from kascade_sglang.calibration.elimination import TRIED, eliminate, fewest_good


class Prompt:
    """A prompt whose loss is the sum of what each layer is worth, once it is no anchor."""

    def __init__(self, worth: dict[int, float]) -> None:
        self.worth, self.tried = worth, []

    def loaded(self) -> nullcontext:
        return nullcontext()

    def keep(self, anchors: tuple[int, ...]) -> float:
        self.anchors = anchors
        return sum(worth for layer, worth in self.worth.items() if layer not in anchors)

    def loss_without(self, layer: int) -> float:
        self.tried.append(layer)
        return self.keep(self.anchors) + self.worth[layer]


def test_takes_away_what_is_missed_least() -> None:
    layers = (1, 3, 5, 7, 9)
    prompts = [Prompt({1: 0, 3: 4, 5: 2, 7: 0, 9: 8}), Prompt({1: 0, 3: 0, 5: 0, 7: 0, 9: 0})]
    found = eliminate(prompts, layers, fewest=1)
    assert found == [
        AnchorChoice((1, 3, 5, 7, 9), 0.0),
        AnchorChoice((1, 3, 5, 9), 0.0),
        AnchorChoice((1, 3, 9), 1.0),
        AnchorChoice((1, 9), 3.0),
        AnchorChoice((1,), 7.0),
    ]
    assert [len(one.anchors) for one in eliminate(prompts, layers)] == [5, 4, 3]


def test_later_rounds_try_the_least_missed() -> None:
    prompt = Prompt({layer: float(layer) for layer in range(20)})
    seen = []
    found = eliminate([prompt], range(20), 17, on_trial=seen.append)
    assert found[-1].anchors == (0, *range(4, 20))
    assert prompt.tried == seen
    assert seen == [*range(1, 20), *range(2, 2 + TRIED), *range(3, 3 + TRIED)]


@pytest.mark.parametrize(
    "losses, count",
    [([0.1, 0.15, 0.2, 0.3], 3), ([0.1, 0.3, 0.15, 0.3], 3), ([0.1, 0.21], 5), ([0.0, 0.0], 4)],
)
def test_fewest_that_lose_little(losses: list[float], count: int) -> None:
    choices = [AnchorChoice(tuple(range(5 - at)), loss) for at, loss in enumerate(losses)]
    assert len(fewest_good(choices).anchors) == count
