"""Every method of ``make eval`` is a configuration that the package accepts, at one budget."""

import json
from pathlib import Path

import pytest

from kascade_sglang.config import KascadeConfig, load_config
from kascade_sglang.evaluation.methods import Method, all_methods, server_arguments
from kascade_sglang.evaluation.show import BUDGET
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import load_plan
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.settings import FLAGS_VARIABLE

PLAN = load_plan(MODEL / PLAN_NAME)
SPARSE = [method for method in all_methods([0.1]) if method.ratio]


def configuration(method: Method, folder: Path) -> KascadeConfig:
    """What a server with the method's arguments would run."""
    arguments, environment = server_arguments(method, "torch_native", folder)
    names = {"--kascade-topk-ratio": "topk_ratio", "--kascade-heads": "heads"}
    names["--kascade-plan"] = "plan"
    flags = {
        names[flag]: value
        for flag, value in zip(arguments, arguments[1:], strict=False)
        if flag in names
    }
    return load_config(
        str(MODEL), PLAN.shape, None, {**environment, FLAGS_VARIABLE: json.dumps(flags)}
    )


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.label)
def test_methods_differ_in_selection_alone(method: Method, tmp_path: Path) -> None:
    config = configuration(method, tmp_path)
    assert config.budget.ratio == 0.1 and config.budget.min_k == PLAN.budget.min_k
    assert config.selection == ("topk" if method.name in ("kascade", "oracle") else method.name)
    everywhere = method.name in ("oracle", "quest")
    assert config.plan.anchors == (tuple(range(12)) if everywhere else PLAN.anchors)
    assert (config.heads == "pooled") == (method.heads == "pooled")


def test_without_head_map_every_head_reuses_its_own_number(tmp_path: Path) -> None:
    (method,) = (method for method in SPARSE if method.heads == "no_map")
    plan = configuration(method, tmp_path).plan
    assert plan.anchors == PLAN.anchors and set(plan.head_map.values()) == {(0, 1)}
    assert set(PLAN.head_map.values()) != {(0, 1)}, "the plan's own maps are not all identities"


def test_labels_are_file_names_of_their_own() -> None:
    labels = [method.label for method in all_methods([0.05, 0.1, 0.2])]
    assert len(set(labels)) == len(labels) == 28
    assert [bool(BUDGET.fullmatch(label)) for label in labels] == [False] + [True] * 27
