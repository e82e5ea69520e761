"""Read the head maps that microsoft/kascade ships: int32 ``[layers, kv_heads]`` in ``.npy``.

Row ``l`` names, for every KV head of layer ``l``, the anchor head it borrows keys from. The
anchors stand in the file's name, as in ``Qwen3-8B_layers_0_2_7_14_23.npy``; their own rows are the
identity.
"""

import re
import tokenize
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from kascade_kernels.budget import Budget
from kascade_sglang.plan.schema import (
    MAX_LAYERS,
    ONE_HOT,
    ModelShape,
    Plan,
    PlanError,
    require_file,
)

_ANCHORS_IN_NAME = re.compile(r"_layers_(\d+(?:_\d+)*)$")
_MAX_BYTES = 2**20
_DAMAGED = (
    *(ValueError, TypeError, SyntaxError, tokenize.TokenError),
    *(RecursionError, MemoryError, OverflowError),
)
"""What NumPy raises, by how a file is damaged; the last for arrays larger than memory."""


def plan_from_npy(
    path: Path,
    anchors: Sequence[int] | None = None,
    model: str | None = None,
    shape: ModelShape | None = None,
    budget: Budget | None = None,
    heads: str = "per_head",
) -> Plan:
    """Build a plan from a published head map.

    anchors: the anchor layers; read from the file's name if None.
    model: the model's name; by default the file name's part before ``_layers_``.
    shape: the model to serve, checked against the array. Without it the plan's shape has the
        array's layers and KV heads and 0 for what the array does not say: fit to look at, not
        to serve.
    The similarity rows are one-hot, for the file holds no similarities.
    Raises PlanError with the file's name for anything that is wrong.
    """
    try:
        table = _read_table(path)
        anchors = tuple(anchors) if anchors is not None else _anchors_of(path)
        layers, kv_heads = table.shape
        found = ModelShape(layers, 0, kv_heads, 0, 0)
        if shape is not None and (shape.layers, shape.kv_heads) != table.shape:
            raise PlanError(
                f"head map: {layers} layers of {kv_heads} KV heads, the model has "
                f"{shape.layers} of {shape.kv_heads}"
            )
        similarity = {
            layer: tuple(map(tuple, np.eye(kv_heads)[table[layer]].tolist()))
            for layer in range(layers)
            if layer not in anchors
        }
        plan = Plan(
            model=model or _ANCHORS_IN_NAME.sub("", path.stem),
            shape=shape or found,
            anchors=anchors,
            similarity=similarity,
            budget=budget or Budget(),
            heads=heads,
            provenance={
                "source": "head map of microsoft/kascade",
                "file": path.name,
                "similarity": ONE_HOT,
            },  # fmt: skip
        )
        _check_anchor_rows(table, plan.anchors)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    return plan


def _anchors_of(path: Path) -> tuple[int, ...]:
    found = _ANCHORS_IN_NAME.search(path.stem)
    if not found:
        raise PlanError(
            "head map: expected a name that ends in _layers_ and the anchors, as in "
            f"x_layers_0_2_8.npy, got {path.name}; rename it, or convert it with `kascade plan "
            "import --anchors 0,2,8`"
        )
    return tuple(int(number) for number in found.group(1).split("_"))


def _check_anchor_rows(table: np.ndarray, anchors: tuple[int, ...]) -> None:
    identity = np.arange(table.shape[1])
    for layer in anchors:
        if not np.array_equal(table[layer], identity):
            raise PlanError(
                f"head map: layer {layer} borrows from other heads, so it is not an anchor of "
                "this map"
            )


def _read_table(path: Path) -> np.ndarray:
    """Return the array, int32 [layers, kv_heads], checked; no pickle is ever loaded."""
    try:
        require_file(path, _MAX_BYTES)
        with path.open("rb") as file:
            table = npy_format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise PlanError(f"head map: more data than {list(table.shape)} of {table.dtype}")
    except PlanError:
        raise
    except OSError as error:
        raise PlanError(f"cannot read the head map ({error.strerror})") from error
    except _DAMAGED as error:
        raise PlanError(f"head map: not a valid .npy file ({error})") from error
    if table.dtype != np.int32 or table.ndim != 2 or len(table) > MAX_LAYERS or not table.size:
        raise PlanError(
            f"head map: expected int32 [layers, kv_heads], got {table.dtype} {list(table.shape)}"
        )
    wrong = np.argwhere((table < 0) | (table >= table.shape[1]))
    if len(wrong):
        layer, head = wrong[0]
        raise PlanError(
            f"head map: layer {layer}, head {head} borrows from head {table[layer, head]}; the "
            f"model has heads 0 to {table.shape[1] - 1}"
        )
    return table
