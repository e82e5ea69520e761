"""What a page says of a prompt is what the reference reads and what softmax weighs."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.calibration.hf_attention import kascade_generate
from kascade_sglang.calibration.selection import Selection, watch
from kascade_sglang.calibration.selection_page import check_target, write_page
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import CalibrationError
from tests.calibration.test_hf_attention import SPARSE, plan_for, prompt_of, qwen3

TOKENS, LENGTH = 4, 600


def watched(budget: Budget, phases: str = "both") -> Selection:
    model = qwen3()
    model.generation_config.eos_token_id = None
    config = KascadeConfig(plan_for(model, budget), budget, "per_head", phases=phases)
    return watch(model, config, prompt_of(LENGTH), TOKENS)


@pytest.fixture(scope="module")
def sparse() -> Selection:
    return watched(SPARSE)


def test_the_answer_is_that_of_the_oracle(sparse: Selection) -> None:
    model = qwen3()
    tokens, _ = kascade_generate(model, plan_for(model, SPARSE), prompt_of(LENGTH), TOKENS)
    assert list(sparse.answer) == tokens and sparse.steps == TOKENS - 1


def test_a_list_is_as_long_as_the_budget_says(sparse: Selection) -> None:
    assert sparse.place == 3 and sparse.read.shape == (4, 2, 200)
    ends = range(LENGTH, LENGTH + TOKENS - 1)
    # A step's list holds the answer's own tokens, which are no part of the prompt.
    expected = np.mean([SPARSE.attended(end) - (end - LENGTH + 1) for end in ends])
    assert sparse.read[1:].sum(axis=2) * sparse.place == pytest.approx(expected)
    assert (sparse.read[0] == 1).all() and (sparse.read <= 1).all()


def test_layers_that_reuse_read_their_anchors_keys(sparse: Selection) -> None:
    # Layer 3 borrows from layer 2, head by head crosswise.
    assert (sparse.read[3] == sparse.read[2][::-1]).all()
    assert (sparse.read[2][0] != sparse.read[2][1]).any()


def test_what_is_read_everywhere_is_kept_everywhere() -> None:
    everything = watched(Budget(1.0, 64))
    assert (everything.read == 1).all() and everything.kept == pytest.approx(1)
    assert everything.found == pytest.approx(everything.weight)


def test_weights_are_those_of_the_models_own_attention() -> None:
    """Of a dense run, whose attention transformers hands out itself."""
    found, model = watched(Budget(1.0, 64), phases="decode"), qwen3()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*found.prompt, *found.answer[:-1]]])
    with torch.inference_mode():
        layers = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(layers):
        rows = weights[0, :, LENGTH:, :LENGTH].double()  # [Hq, steps, prompt]
        by_head = rows.mean(dim=1).unflatten(0, (2, -1)).mean(dim=1)
        places = by_head.unflatten(1, (-1, found.place)).sum(dim=2)
        assert found.weight[layer] == pytest.approx(places.numpy(), abs=1e-6)


def test_less_is_kept_than_there_is(sparse: Selection) -> None:
    assert (sparse.found <= sparse.weight + 1e-12).all()
    assert sparse.kept[0] == pytest.approx(1) and (sparse.kept[1:] < 1).all()
    assert (sparse.kept[1:] > sparse.found[1:].sum(axis=2)).all(), "the answer's own are kept too"


class Page(HTMLParser):
    """What a page loads, its tags and which texts it outlines."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded, self.tags, self.outlined = [], [], 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.loaded += [named[name] for name in ("src", "href") if name in named]
        self.outlined += named.get("class") == "mark"


def test_the_page_loads_nothing_and_runs_nothing(sparse: Selection, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    mark = f"<{sparse.prompt[4]}><{sparse.prompt[5]}><{sparse.prompt[6]}>"
    write_page(sparse, lambda ids: "".join(f"<{n}>" for n in ids), path, mark)
    page = Page()
    page.feed(path.read_text())
    assert page.tags.count("img") == 2 * 4 + 2 and "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    # The text lies in two places, which the list of passages may show once more.
    assert 2 <= page.outlined <= 4
    assert "<b>" + f"{sparse.read[1:].mean():.1%}" in path.read_text()


def test_refusals(sparse: Selection, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"expected a name that ends in .html, got .png"):
        check_target("--report", tmp_path / "a.png", {})
    with pytest.raises(CalibrationError, match="expected a folder that exists"):
        check_target("--report", tmp_path / "no" / "a.html", {})
    with pytest.raises(CalibrationError, match="cannot write the page"):
        write_page(sparse, str, tmp_path / "no" / "a.html")
    model = qwen3()
    wrong = replace(plan_for(model, SPARSE).shape, hidden=5)
    config = KascadeConfig(replace(plan_for(model, SPARSE), shape=wrong), SPARSE, "per_head")
    with pytest.raises(ValueError, match="hidden is 32, the plan has 5"):
        watch(model, config, [1])
