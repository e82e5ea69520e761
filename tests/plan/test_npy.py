"""The head maps of microsoft/kascade: conversion, and one sentence for every damaged file."""

from pathlib import Path

import numpy as np
import pytest

from kascade_kernels.budget import Budget
from kascade_sglang.plan.npy import plan_from_npy
from kascade_sglang.plan.schema import ModelShape, PlanError, load_plan

TABLE = np.array([[0, 1, 2], [2, 2, 0], [0, 1, 2], [1, 0, 1], [2, 1, 0]], dtype=np.int32)
SHAPE = ModelShape(layers=5, q_heads=12, kv_heads=3, head_dim=16, hidden=64)
NAME = "Tiny-8B_layers_0_2.npy"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.save(tmp_path / NAME, TABLE)
    return tmp_path / NAME


def test_converts(path: Path) -> None:
    plan = plan_from_npy(path, model="org/tiny", shape=SHAPE, budget=Budget(0.2), heads="pooled")
    assert plan.anchors == (0, 2)
    assert plan.head_map == {1: (2, 2, 0), 3: (1, 0, 1), 4: (2, 1, 0)}
    assert plan.similarity[1] == ((0.0, 0.0, 1.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
    assert (plan.model, plan.shape, plan.budget.ratio, plan.heads) == (
        "org/tiny", SHAPE, 0.2, "pooled"
    )  # fmt: skip
    assert "one-hot" in plan.provenance["similarity"] and plan.provenance["file"] == NAME


def test_converted_plan_is_a_plan_file(path: Path, tmp_path: Path) -> None:
    plan = plan_from_npy(path, shape=SHAPE)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_without_a_model_the_shape_is_what_the_array_says(path: Path) -> None:
    plan = plan_from_npy(path)
    assert plan.model == "Tiny-8B"
    assert (plan.shape.layers, plan.shape.kv_heads) == (5, 3)
    with pytest.raises(PlanError, match="q_heads is 12"):
        plan.check_fits(SHAPE)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_order(tmp_path: Path, order: str) -> None:
    np.save(tmp_path / NAME, np.asarray(TABLE, order=order))
    assert plan_from_npy(tmp_path / NAME).head_map[1] == (2, 2, 0)


def test_anchors_given(tmp_path: Path) -> None:
    np.save(tmp_path / "map.npy", TABLE)
    assert plan_from_npy(tmp_path / "map.npy", anchors=[0, 2]).anchors == (0, 2)
    with pytest.raises(PlanError, match="got map.npy; rename it, or .* import --anchors 0,2,8"):
        plan_from_npy(tmp_path / "map.npy")


@pytest.mark.parametrize(
    "anchors, sentence",
    [
        ((0, 3), "layer 3 borrows from other heads, so it is not an anchor"),
        ((2,), "expected ascending layers from 0"),
        ((), "expected ascending layers from 0"),
        ((0, 5), "expected layers below 5"),
    ],
    ids=str,
)
def test_refuses_anchors(path: Path, anchors: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        plan_from_npy(path, anchors)


@pytest.mark.parametrize(
    "array, sentence",
    [
        (TABLE.astype(np.int64), "expected int32 .*, got int64"),
        (TABLE.astype(np.float32), "expected int32 .*, got float32"),
        (TABLE.astype(">i4"), "expected int32 .*, got >i4"),
        (np.array([{"a": 1}], dtype=object), "not a valid .npy file .Object arrays"),
        (TABLE[0], r"expected int32 \[layers, kv_heads\], got int32 \[3\]"),
        (TABLE[None], "expected int32"),
        (TABLE[:0], "expected int32"),
        (TABLE[:, :0], "expected int32"),
        (np.zeros((5000, 1), np.int32), "expected int32"),
        (TABLE + 1, "layer 0, head 2 borrows from head 3; the model has heads 0 to 2"),
        (TABLE - 1, "layer 0, head 0 borrows from head -1"),
    ],
    ids=["int64", "float", "big-endian", "pickle", "flat", "3d", "no-layers", "no-heads",
         "too-many-layers", "head-high", "head-negative"],
)  # fmt: skip
def test_refuses_arrays(tmp_path: Path, array: np.ndarray, sentence: str) -> None:
    np.save(tmp_path / NAME, array, allow_pickle=True)
    with pytest.raises(PlanError, match=sentence):
        plan_from_npy(tmp_path / NAME)


def test_refuses_another_models_shape(path: Path) -> None:
    with pytest.raises(PlanError, match="5 layers of 3 KV heads, the model has 6 of 3"):
        plan_from_npy(path, shape=ModelShape(6, 12, 3, 16, 64))


def test_refuses_cut_padded_and_foreign_files(path: Path) -> None:
    whole = path.read_bytes()
    for content in [whole[:length] for length in range(len(whole))] + [whole + b"\0", b"PK\3\4"]:
        path.write_bytes(content)
        with pytest.raises(PlanError, match=f"{NAME}: "):
            plan_from_npy(path)


def test_never_fails_otherwise_on_a_damaged_byte(path: Path) -> None:
    """Any one byte changed: refused in a sentence, or still a plan (a changed head number)."""
    whole = path.read_bytes()
    refused = 0
    for index in range(len(whole)):
        for value in (0, ord("("), ord("'"), 255):
            path.write_bytes(whole[:index] + bytes([value]) + whole[index + 1 :])
            try:
                plan_from_npy(path)
            except PlanError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > len(whole)


def test_refuses_missing_and_huge(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        plan_from_npy(tmp_path / NAME)
    np.save(tmp_path / NAME, np.zeros((4096, 128), np.int32))
    with pytest.raises(PlanError, match="more than the"):
        plan_from_npy(tmp_path / NAME)
