"""Plans and head maps that nobody should trust: one sentence, no traceback, no wait, no write."""

from pathlib import Path

import pytest

from kascade_sglang.cli import main
from kascade_sglang.plan.library import find_plan
from kascade_sglang.plan.schema import PlanError, load_plan
from tests.hostile.conftest import Refused, at_most
from tests.hostile.files import PLAN, SHAPE, head_maps, no_files, plans

PLANS = dict(plans())
HEAD_MAPS = [name for name, _ in head_maps(Path("marker"))]


def test_the_plan_that_is_spoilt_is_a_good_one(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert main(["plan", "check", str(tmp_path / "plan.json")]) == 0


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(PLANS[name])
    said = refused("plan", "check", path)
    assert said.startswith(f"{path}: ")
    with pytest.raises(PlanError):
        find_plan("org/model", SHAPE, str(path))


@pytest.mark.parametrize("command", ["show", "report", "diff", "import"])
def test_every_command_reads_with_the_same_care(
    command: str, refused: Refused, tmp_path: Path, small_model: Path
) -> None:
    path = tmp_path / ("map.npy" if command == "import" else "plan.json")
    more = {
        "report": ["--out", tmp_path / "page.html"],
        "diff": [path],
        "import": ["--model", small_model, "--out", tmp_path / "out.json"],
    }
    for content in (b"", b"[" * 100_000, b"\xff\xfe"):
        path.write_bytes(content)
        assert str(path) in refused("plan", command, path, *more.get(command, []))


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_what_is_no_file(suffix: str, refused: Refused, tmp_path: Path) -> None:
    paths = list(no_files(tmp_path, suffix))
    assert len(paths) == 8
    for path in paths:
        assert path.name[:50] in refused("plan", "check", path)


def test_servers_read_plans_with_the_same_care(tmp_path: Path) -> None:
    for path in no_files(tmp_path, ".json"):
        with at_most(30), pytest.raises(PlanError):
            find_plan("org/model", SHAPE, str(path))
        with at_most(30), pytest.raises(PlanError):
            load_plan(path)


@pytest.mark.parametrize("name", HEAD_MAPS)
def test_head_maps(name: str, refused: Refused, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "map_layers_0_2.npy"
    path.write_bytes(dict(head_maps(marker))[name])
    assert refused("plan", "check", path).startswith(f"{path}: ")
    assert not marker.exists()
