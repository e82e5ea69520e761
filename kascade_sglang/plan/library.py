"""Find the plan for a model: beside its weights, among those the package ships, or a preset."""

import logging
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kascade_sglang.files import expand
from kascade_sglang.plan.presets import (
    PREFIX,
    PRESETS,
    preset,
    preset_for,
    presets_of,
    same_name,
    warning_of,
)
from kascade_sglang.plan.schema import ModelShape, Plan, PlanError, load_plan

logger = logging.getLogger(__name__)

PLAN_NAME = "kascade_plan.json"
SHIPPED = Path(__file__).parent / "data"
_warned: set[str] = set()
"""Sentences this process has logged: it looks its plan up more than once."""


class Found(NamedTuple):
    """A plan and where it was found: a file, or ``preset:NAME``."""

    plan: Plan
    place: str


def find_plan(model: str, shape: ModelShape, explicit: str | None) -> Plan:
    """Return the plan to serve ``model`` with, checked against its shape.

    explicit: a path or ``preset:NAME`` the user gave; otherwise ``kascade_plan.json`` in the
    model's folder or, for a hub id, in the Hub's cache; then a shipped plan and then a preset, of
    the last part of the model's name and of its shape.
    Logs a warning where nobody has measured the plan's head map. Raises PlanError, saying how to
    calibrate, if none fits.
    """
    plan = locate_plan(model, shape, explicit).plan
    plan.check_fits(shape)
    warning = warning_of(plan)
    if warning is not None and warning not in _warned:
        _warned.add(warning)
        logger.warning("kascade: %s", warning)
    return plan


def read_plan(name: str) -> Plan:
    """Read the plan file, or return the preset, that a user has named; raises PlanError."""
    if name.startswith(PREFIX):
        return preset(name.removeprefix(PREFIX))
    return _load(expand(name))


def _load(path: Path) -> Plan:
    """Read a file once a process, as long as it does not change."""
    found = path.stat() if os.path.isfile(path) else None
    return _load_version(path, found and (found.st_mtime_ns, found.st_size, found.st_ino))


@cache
def _load_version(path: Path, version: tuple[int, ...] | None) -> Plan:
    return load_plan(path)


def locate_plan(model: str, shape: ModelShape, explicit: str | None) -> Found:
    """Return the plan that ``find_plan`` takes and where it is; its shape is not checked.

    Raises PlanError, saying where it was looked for, if there is none.
    """
    if explicit:
        return Found(read_plan(explicit), explicit)
    beside = _beside(model)
    if beside is not None:
        return Found(_load(beside), str(beside))
    for path, plan in shipped_plans().items():
        if same_name(plan.model, model) and plan.shape == shape:
            return Found(plan, str(path))
    plan = preset_for(model, shape)
    if plan is not None:
        return Found(plan, PREFIX + plan.model)
    fitting = [*_shipped_for(shape), *(PREFIX + name for name in presets_of(shape))]
    others = f", or, if it is one of these, --kascade-plan {' or '.join(fitting)}"
    raise PlanError(
        f"no Kascade plan for {model}: {_why_none(model, shape)}; make one with `kascade "
        f"calibrate --model {model} --prompts prompts.txt --out plan.json` and pass "
        f"--kascade-plan plan.json{others if fitting else ''}"
    )


def _shipped_for(shape: ModelShape) -> list[str]:
    return [str(path) for path, plan in shipped_plans().items() if plan.shape == shape]


def _beside(model: str) -> Path | None:
    """Return the plan that stands beside a model's weights, on disk or in the Hub's cache."""
    path = expand(model)
    if os.path.exists(path):
        found = (path if os.path.isdir(path) else path.parent) / PLAN_NAME
        return found if os.path.isfile(found) else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, PLAN_NAME)
    except HFValidationError:  # no hub id either
        return None
    return Path(cached) if isinstance(cached, str) else None


def shipped_plans() -> dict[Path, Plan]:
    """Return the calibrated plans that the package holds, by their files."""
    return {path: _load(path) for path in sorted(SHIPPED.glob("*.json"))}


def _why_none(model: str, shape: ModelShape) -> str:
    """Say why no plan was found without a flag."""
    beside = f"no {PLAN_NAME} beside its weights"
    known = [*shipped_plans().values(), *map(preset, PRESETS)]
    for plan in known:
        if same_name(plan.model, model):
            differences = ", ".join(plan.shape.differences(shape))
            return f"{beside}, and that of {plan.model} is for another shape ({differences})"
    names = ", ".join(sorted({plan.model.rpartition("/")[2] for plan in known}))
    return f"{beside}, and its name is none of those that have a plan here ({names})"
