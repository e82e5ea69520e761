"""A plan of six layers and three KV heads, as an object and as the file's JSON value."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kascade_kernels.budget import Budget
from kascade_sglang.plan.schema import ModelShape, Plan


def rows(*heads: int) -> tuple[tuple[float, ...], ...]:
    """Similarity rows whose argmax is the given anchor heads."""
    return tuple(tuple(0.9 if column == head else 0.25 for column in range(3)) for head in heads)


@pytest.fixture
def plan() -> Plan:
    return Plan(
        model="org/tiny",
        shape=ModelShape(layers=6, q_heads=12, kv_heads=3, head_dim=16, hidden=96),
        anchors=(0, 2),
        similarity={1: rows(2, 0, 1), 3: rows(0, 0, 0), 4: rows(1, 2, 2), 5: rows(2, 2, 1)},
        budget=Budget(0.2, 256),
        heads="pooled",
        provenance={"source": "by hand", "importance": [0.5, 0.4, 0.3, 0.2, 0.1, 0.05]},
    )


@pytest.fixture
def raw(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(plan.to_json()))


@pytest.fixture
def plan_file(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


@pytest.fixture
def pool_plan(plan: Plan) -> Plan:
    """The plan with anchors 2, a maker, and 4, which scores its pool."""
    similarity = plan.similarity | {4: rows(1, 2, 0)}
    pools = {"makers": (2,), "pool_share": 0.25}
    return replace(plan, anchors=(0, 2, 4), similarity=similarity, **pools)
