"""SGLang with the plugin loaded, and model folders that hold a config and a plan only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins

from kascade_sglang.config import FLAGS_VARIABLE, Settings, environment_variable
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import Plan
from tests.support.models import LLAMA, make_plan


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    load_plugins()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the caller's shell takes part; what a test's parser sets is undone."""
    monkeypatch.setenv(FLAGS_VARIABLE, "{}")
    for name in Settings.model_fields:
        monkeypatch.delenv(environment_variable(name), raising=False)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a model folder: LLAMA's config with changes, and a plan unless told otherwise."""

    def make(plan: Plan | None = None, with_plan: bool = True, **changes: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        if with_plan:
            (plan or make_plan()).save(folder / PLAN_NAME)
        return folder

    return make
