"""Settings: precedence of their sources, and refusals that name the source."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kascade_kernels.budget import Budget
from kascade_sglang.backend.selectors import SELECTORS
from kascade_sglang.config import load_config
from kascade_sglang.errors import KascadeError
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.settings import FLAGS_VARIABLE, MIN_K, PREFILL_MIN_K, SETTINGS, read_settings
from tests.support.models import SHAPE, make_plan


def test_flag_beats_environment_beats_model_config_beats_plan(tmp_path: Path) -> None:
    plan = make_plan(budget=Budget(0.5, 128), decode_min_k=512, heads="pooled")
    plan.save(tmp_path / PLAN_NAME)
    model_options = {"topk_ratio": 0.4, "min_k": 256}
    environment = {"KASCADE_TOPK_RATIO": "0.3"}
    flags = {FLAGS_VARIABLE: json.dumps({"topk_ratio": 0.2})}

    def ratio_minimum_heads(options: dict | None, environ: dict) -> tuple[float, int, str]:
        config = load_config(str(tmp_path), SHAPE, options, environ)
        return config.budget.ratio, config.budget.min_k, config.heads

    assert ratio_minimum_heads(None, {}) == (0.5, 512, "pooled")
    assert ratio_minimum_heads(model_options, {}) == (0.4, 256, "pooled")
    assert ratio_minimum_heads(model_options, environment) == (0.3, 256, "pooled")
    both = {**environment, **flags}
    assert ratio_minimum_heads(model_options, both) == (0.2, 256, "pooled")
    every = {**both, "KASCADE_HEADS": "per_head", "KASCADE_MIN_K": "64"}
    assert ratio_minimum_heads(None, every) == (0.2, 64, "per_head")


def test_plan_beside_the_weights_gives_way_to_a_named_one(tmp_path: Path) -> None:
    make_plan(budget=Budget(0.5, 128)).save(tmp_path / PLAN_NAME)
    other = tmp_path / "other.json"
    make_plan(budget=Budget(0.25, 64), decode_min_k=64).save(other)
    config = load_config(str(tmp_path), SHAPE, None, {"KASCADE_PLAN": str(other)})
    assert config.budget == Budget(0.25, 64)


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        ({"ratio": 0.1}, {}, "model config \"kascade\": unknown setting 'ratio'; known: plan"),
        ([0.1], {}, "expected an object of settings, got"),
        ({"heads": "all"}, {}, "heads"),
        ({}, {"KASCADE_TOPK_RATIO": "tenth"}, "environment KASCADE_\\*: topk_ratio"),
        ({}, {"KASCADE_MIN_K": "128.5"}, "environment KASCADE_\\*: min_k"),
    ],
    ids=["unknown", "not-an-object", "heads", "ratio", "min-k"],
)
def test_refusals_name_the_source(options: object, environ: dict, expected: str) -> None:
    with pytest.raises(KascadeError, match=expected):
        read_settings(options, environ)


def test_selections_are_the_selectors() -> None:
    assert set(SETTINGS["selection"].choices) == set(SELECTORS)
    for name in SELECTORS:
        assert read_settings(None, {"KASCADE_SELECTION": name}).selection == name
    with pytest.raises(KascadeError) as refused:
        read_settings(None, {"KASCADE_SELECTION": "h2o"})
    sentence = str(refused.value)
    assert sentence.startswith("environment KASCADE_*: selection: ") and "\n" not in sentence
    assert sentence.endswith(", got 'h2o'") and all(f"'{name}'" in sentence for name in SELECTORS)


def test_quest_selects_in_every_layer(tmp_path: Path) -> None:
    make_plan().save(tmp_path / PLAN_NAME)

    def anchors(selection: str) -> tuple[int, ...]:
        return load_config(str(tmp_path), SHAPE, {"selection": selection}, {}).plan.anchors

    assert anchors("quest") == (0, 1, 2, 3)
    assert anchors("omnikv") == anchors("topk") == (0, 2)


def test_phases_have_budgets_of_their_own(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / PLAN_NAME)

    def budgets(**settings: object) -> tuple[Budget, Budget]:
        config = load_config(str(tmp_path), SHAPE, settings, {})
        return config.budget, config.prefill_budget

    least = PREFILL_MIN_K
    assert budgets() == (Budget(0.1, MIN_K), Budget(0.1, least))
    assert budgets(topk_ratio=0.2, min_k=256) == (Budget(0.2, 256), Budget(0.2, least))
    assert budgets(min_k=2 * least) == (Budget(0.1, 2 * least),) * 2
    assert budgets(prefill_min_k=64, prefill_topk_ratio=0.3)[1] == Budget(0.3, 64)
    replace(plan, decode_min_k=256, prefill_min_k=512).save(tmp_path / PLAN_NAME)
    assert budgets() == (Budget(0.1, 256), Budget(0.1, 512))
    with pytest.raises(KascadeError, match=r"^prefill_min_k: expected .* got 8$"):
        budgets(prefill_min_k=8)


def test_a_preset_says_what_nobody_else_says(tmp_path: Path) -> None:
    make_plan().save(tmp_path / PLAN_NAME)

    def served(**settings: object) -> tuple[int, int, str]:
        config = load_config(str(tmp_path), SHAPE, settings, {})
        return config.budget.min_k, config.prefill_budget.min_k, config.phases

    balanced = (MIN_K, PREFILL_MIN_K)
    assert served() == served(preset="balanced") == (*balanced, "both")
    assert served(preset="fast") == (128, 128, "both")
    assert served(preset="careful") == (*balanced, "decode")
    assert served(preset="fast", prefill_min_k=1024) == (128, 1024, "both")
    assert served(preset="careful", phases="both") == (*balanced, "both")
    with pytest.raises(KascadeError, match="preset: .* got 'quick'"):
        served(preset="quick")


def test_a_missing_plan_hides_no_other_mistake(tmp_path: Path) -> None:
    environ = {"KASCADE_PLAN": str(tmp_path / "no.json"), "KASCADE_MIN_K": "10"}
    environ |= {"KASCADE_PREFILL_TOPK_RATIO": "2"}
    with pytest.raises(KascadeError) as refused:
        load_config("m", SHAPE, None, environ)
    said = str(refused.value).split("\n")
    assert len(said) == 3 and said[0].startswith("min_k: ")
    assert said[1].startswith("prefill_topk_ratio: ") and "no.json" in said[2]
