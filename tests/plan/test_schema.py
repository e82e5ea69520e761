"""Plans: round trip, derived fields, and one sentence for every damaged file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kascade_sglang.plan import schema
from kascade_sglang.plan.schema import (
    LayerRole,
    ModelShape,
    Plan,
    PlanError,
    load_plan,
    plan_from_json,
)

Damage = Callable[[dict[str, Any]], object]


def test_round_trip(plan: Plan, plan_file: Path) -> None:
    assert load_plan(plan_file) == plan
    assert [path.name for path in plan_file.parent.iterdir()] == ["plan.json"]


def test_save_replaces_in_one_step(plan: Plan, plan_file: Path, monkeypatch: Any) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        replace(plan, model="other").save(plan_file)
    monkeypatch.undo()
    assert load_plan(plan_file).model == "org/tiny"
    assert [path.name for path in plan_file.parent.iterdir()] == ["plan.json"]


def test_derived_fields(plan: Plan) -> None:
    assert plan.anchor_of == (0, 0, 2, 2, 2, 2)
    assert plan.reuse_layers == [1, 3, 4, 5]
    assert plan.head_map == {1: (2, 0, 1), 3: (0, 0, 0), 4: (1, 2, 2), 5: (2, 2, 1)}
    roles = [plan.role(layer) for layer in range(4)]
    assert roles == [LayerRole.DENSE, LayerRole.REUSE, LayerRole.ANCHOR, LayerRole.REUSE]


def test_head_map_ties_go_to_the_lower_head(plan: Plan) -> None:
    tied = ((0.1, 0.5, 0.5), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0))
    assert replace(plan, similarity={**plan.similarity, 1: tied}).head_map[1] == (1, 0, 0)


@pytest.mark.parametrize("field", ["layers", "q_heads", "kv_heads", "head_dim", "hidden"])
def test_check_fits(plan: Plan, field: str) -> None:
    plan.check_fits(plan.shape)
    served = replace(plan.shape, **{field: 99})
    with pytest.raises(PlanError, match=f"another model .org/tiny.: {field} is 99, the plan has"):
        plan.check_fits(served)


def put(path: str, value: object) -> Damage:
    """Set a dotted field of the raw plan."""

    def damage(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            raw = raw[parent]
        raw[last] = value

    return damage


def drop(path: str) -> Damage:
    def damage(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            raw = raw[parent]
        del raw[last]

    return damage


SQUARE = [[0.5] * 3] * 3
REFUSED: list[tuple[str, Damage, str]] = [
    ("foreign", put("format", "other"), "not a Kascade plan"),
    ("no-format", drop("format"), "not a Kascade plan"),
    ("version-2", put("version", 2), "plan.version: expected 1, got 2"),
    ("no-version", drop("version"), "plan.version is missing"),
    ("tile-64", put("tile", 64), "plan.tile: expected 32, got 64"),
    ("no-model", drop("model"), "plan.model is missing"),
    ("model-string", put("model", "org/tiny"), "plan.model: expected .*, got 'org/tiny'"),
    ("no-id", drop("model.id"), "plan.model.id is missing"),
    (
        "layers-text",
        put("model.layers", "6"),
        "plan.model.layers: expected a whole number, got '6'",
    ),
    ("layers-true", put("model.layers", True), "plan.model.layers: expected a whole number"),
    ("layers-0", put("model.layers", 0), "plan.model.layers: expected .* 1, got 0"),
    ("layers-huge", put("model.layers", 10**12), "plan.model.layers: expected .* 4096, got 10"),
    ("kv-0", put("model.kv_heads", 0), "plan.model.kv_heads: expected .* 1, got 0"),
    ("kv-other", put("model.kv_heads", 4), "must hold 4 x 4 numbers"),
    ("layer-more", put("model.layers", 7), "layer 6 is missing"),
    ("anchors-empty", put("anchors", []), r"expected ascending layers from 0, got \[\]"),
    ("anchors-from-1", put("anchors", [1, 2]), "expected ascending layers from 0"),
    ("anchors-descend", put("anchors", [0, 3, 2]), "expected ascending layers from 0"),
    ("anchors-twice", put("anchors", [0, 2, 2]), "expected ascending layers from 0"),
    ("anchors-beyond", put("anchors", [0, 6]), "expected layers below 6"),
    ("anchors-negative", put("anchors", [0, -2]), "expected ascending layers from 0"),
    ("anchors-text", put("anchors", [0, "2"]), "plan.anchors.1: expected a whole number, got '2'"),
    ("anchors-half", put("anchors", [0, 1.5]), "plan.anchors.1: expected a whole number, got 1.5"),
    ("anchors-number", put("anchors", 2), "plan.anchors: expected .*, got 2"),
    (
        "windowed-text",
        put("windowed", ["1"]),
        "plan.windowed.0: expected a whole number, got '1'",
    ),
    ("no-anchors", drop("anchors"), "plan.anchors is missing"),
    ("anchor-of", put("anchor_of", [0, 0, 2, 2, 2, 0]), "plan.anchor_of: every layer must"),
    ("no-anchor-of", drop("anchor_of"), "plan.anchor_of is missing"),
    ("no-layer", drop("similarity.4"), "layer 4 is missing"),
    ("anchor-row", put("similarity.2", SQUARE), r"layers \[2\] borrow nothing"),
    ("row-short", put("similarity.1", [[0.5] * 3] * 2), "layer 1 must hold 3 x 3"),
    ("row-ragged", put("similarity.1", [[1], [1, 2], [1, 2, 3]]), "layer 1 must hold 3 x 3"),
    ("negative", put("similarity.1", [[0.5, -1, 0]] * 3), "layer 1 must hold 3 x 3"),
    ("nan", put("similarity.1", [[0.5, float("nan"), 0]] * 3), "expected numbers, got NaN"),
    (
        "infinity",
        put("similarity.1", [[0.5, float("inf"), 0]] * 3),
        "expected numbers, got Infinity",
    ),
    (
        "too-big",
        put("similarity.1", [[10**400, 0, 0]] * 3),
        "plan.similarity.1.0.0: expected a valid number",
    ),
    ("text", put("similarity.1", [["x", 0, 0]] * 3), "plan.similarity.1.0.0: expected .*, got 'x'"),
    ("similarity-list", put("similarity", []), r"plan.similarity: expected .*, got \[\]"),
    (
        "layer-name",
        put("similarity.first", SQUARE),
        "plan.similarity.first.* expected a whole number",
    ),
    ("ratio-0", put("topk_ratio", 0), r"plan.topk_ratio: expected a number in \(0, 1\]"),
    ("ratio-2", put("topk_ratio", 2), r"topk_ratio: expected a number in \(0, 1\]"),
    ("ratio-text", put("topk_ratio", "0.1"), r"topk_ratio: expected a number in \(0, 1\]"),
    ("no-ratio", drop("topk_ratio"), "plan.topk_ratio is missing"),
    ("min-k-16", put("min_k", 16), "plan.min_k: expected a whole number of at least 64"),
    ("prefill-16", put("prefill_min_k", 16), "plan.prefill_min_k: expected .* at least 64"),
    ("decode-16", put("decode_min_k", 16), "plan.decode_min_k: expected .* at least 64"),
    ("prefill-text", put("prefill_min_k", "x"), "prefill_min_k: expected"),
    ("heads", put("heads", "both"), "plan.heads: expected 'per_head' or 'pooled', got 'both'"),
    ("no-heads", drop("heads"), "plan.heads is missing"),
    ("makers", put("makers", [1]), r"plan.makers: expected some of the anchors \[0, 2\]"),
    ("makers-alone", put("makers", [0]), "plan.pool_share: expected a share with makers"),
    ("share-alone", put("pool_share", 0.5), "plan.pool_share: expected a share with makers"),
    ("provenance", put("provenance", 5), "plan.provenance: expected .*, got 5"),
]


@pytest.mark.parametrize(
    "damage, sentence", [pytest.param(*rest, id=name) for name, *rest in REFUSED]
)
def test_refuses_damaged_fields(
    raw: dict[str, Any], tmp_path: Path, damage: Damage, sentence: str
) -> None:
    damage(raw)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=sentence) as error:
        load_plan(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "not valid JSON"),
        (b'{"format": "kascade-plan", "ver', "not valid JSON"),
        (b"\x80\x81\x82", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b"[]", "not a Kascade plan"),
        (b"null", "not a Kascade plan"),
        (b'"kascade-plan"', "not a Kascade plan"),
    ],
    ids=["empty", "cut-off", "binary", "deep", "long-number", "list", "null", "string"],
)
def test_refuses_foreign_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=sentence):
        load_plan(path)


def test_refuses_every_cut_of_a_file(plan_file: Path) -> None:
    whole = plan_file.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        plan_file.write_bytes(whole[:length])
        with pytest.raises(PlanError, match="not valid JSON"):
            load_plan(plan_file)


def test_refuses_missing_folder_and_huge_files(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        load_plan(tmp_path / "none.json")
    with pytest.raises(PlanError, match="got a folder"):
        load_plan(tmp_path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(schema.MAX_BYTES + 1)
    with pytest.raises(PlanError, match="more than the"):
        load_plan(huge)


def test_plan_from_json_needs_no_file(raw: dict[str, Any], plan: Plan) -> None:
    assert plan_from_json(raw) == plan


def test_one_layer_is_a_plan() -> None:
    shape = ModelShape(layers=1, q_heads=1, kv_heads=1, head_dim=8, hidden=8)
    assert Plan("one", shape, (0,), {}).head_map == {}


def test_importing_loads_neither_torch_nor_sglang() -> None:
    code = (
        "import sys; import kascade_sglang.cli, kascade_sglang.plan.library; "
        "print([name for name in ('torch', 'sglang', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_phases_keep_their_least_numbers_of_keys(tmp_path: Path, plan_file: Path) -> None:
    plan = load_plan(plan_file)
    assert plan.decode_min_k is plan.prefill_min_k is None
    assert not {"decode_min_k", "prefill_min_k"} & plan.to_json().keys()
    other = replace(plan, decode_min_k=256, prefill_min_k=512)
    other.save(tmp_path / "other.json")
    assert load_plan(tmp_path / "other.json") == other


def test_plan_with_pools_comes_back(pool_plan: Plan, tmp_path: Path) -> None:
    pool_plan.save(tmp_path / "plan.json")
    found = load_plan(tmp_path / "plan.json")
    assert found == pool_plan and found.maker_of == {4: 2}
    assert found.reuse_layers == [1, 3, 5] and found.borrowing_layers == [1, 3, 4, 5]
    assert found.head_map[4] == (1, 2, 0) and found.pool_rule.share == 0.25


def test_plans_without_pools_say_nothing_of_them(plan: Plan) -> None:
    assert not {"makers", "pool_share"} & plan.to_json().keys()
    assert plan.maker_of == {} and plan.pool_rule is None


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop("similarity.4"), "plan.similarity: layer 4 is missing"),
        (drop("makers"), "plan.pool_share: expected a share with makers"),
        (put("pool_share", 1), "plan.pool_share: expected a number between 0 and 1, got 1"),
        (put("pool_share", "x"), "plan.pool_share: expected a number between 0 and 1, got 'x'"),
        (put("makers", [4, 2]), "plan.makers: expected some of the anchors"),
    ],
)
def test_refuses_damaged_pools(pool_plan: Plan, damage: Damage, sentence: str) -> None:
    raw = json.loads(json.dumps(pool_plan.to_json()))
    damage(raw)
    with pytest.raises(PlanError, match=sentence):
        plan_from_json(raw)
