"""What the documents show works: examples run, variables and make's targets exist."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kascade_sglang.host.release import VERIFIED
from kascade_sglang.settings import SETTINGS
from tests.support.documents import NOT_RUN, ROOT, Block, blocks, documents

SOURCES = (ROOT / "kascade_sglang", ROOT / "kernels", ROOT / "patches")


def examples(language: str) -> list[tuple[str, Block]]:
    """Blocks of a language, with names for a test's report."""
    return [
        (f"{path.relative_to(ROOT)}:{block.line}", block)
        for path in documents()
        for block in blocks(path.read_text())
        if block.language == language
    ]


PYTHON = examples("python")


def named(pair: object) -> str:
    return pair[0] if isinstance(pair, tuple) else str(pair)


@pytest.mark.parametrize("example", PYTHON, ids=named)
def test_python_examples_run(example: tuple[str, Block], tmp_path: Path) -> None:
    name, block = example
    compile(block.text, name, "exec")
    if NOT_RUN.search(block.before):
        return
    result = subprocess.run(
        [sys.executable, "-c", block.text],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert result.returncode == 0, f"{name}\n{result.stderr[-3000:]}"


def test_some_examples_are_run() -> None:
    run = [name for name, block in PYTHON if not NOT_RUN.search(block.before)]
    assert len(run) >= 3 and any("kernels.md" in name for name in run)


def with_doctests() -> list[str]:
    modules = []
    for root, folder in zip((ROOT, ROOT / "kernels", ROOT / "patches"), SOURCES, strict=True):
        for path in sorted(folder.rglob("*.py")):
            if ">>> " in path.read_text():
                modules.append(".".join(path.relative_to(root).with_suffix("").parts))
    return modules


def test_some_docstrings_have_examples() -> None:
    assert {"kascade_kernels.budget", "kascade_sglang.plan.presets"} <= set(with_doctests())


@pytest.mark.parametrize("name", with_doctests())
def test_docstrings_examples_run(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_exist(path: Path) -> None:
    text = path.read_text()
    variables = {setting.variable for setting in SETTINGS.values()} | {"KASCADE_FLAGS"}
    assert set(re.findall(r"\bKASCADE_[A-Z_]*[A-Z]", text)) <= variables


def test_what_make_names_of_the_tests_is_there() -> None:
    named = set(re.findall(r"\btests/[\w./]+(?![\w./*])", (ROOT / "Makefile").read_text()))
    assert len(named) > 10
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in documents():
        named_targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), re.M))
        assert named_targets <= targets, path
    readme = (ROOT / "README.md").read_text()
    assert {"demo", "test", "test-fast", "test-gpu"} <= set(re.findall(r"make ([a-z-]+)", readme))


def test_a_new_release_is_tried_by_one_command(tmp_path: Path) -> None:
    """All but the venv and the tests: what `make try-host` writes, twice."""
    host = Path("kascade_sglang/host")
    (tmp_path / host).mkdir(parents=True)
    for name in ("Makefile", "setup.cfg", str(host / "release.py")):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = ["make", "try-host", "SGLANG=9.8.7", "MAKE=true"]
    for _ in range(2):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    values: dict[str, object] = {}
    exec((tmp_path / host / "release.py").read_text(), values)
    assert values["VERIFIED"] == (*VERIFIED, "9.8.7")
    assert f"sglang>={VERIFIED[0]},<=9.8.7\n" in (tmp_path / "setup.cfg").read_text()


def test_the_guide_to_the_kernels_has_every_call() -> None:
    """Each operation of the register has a row, and stands in an example."""
    register = (ROOT / "kernels/README.md").read_text().split("| operation |")[1].split("\n\n")[0]
    operations = [line.split("|")[2].strip(" `") for line in register.splitlines()[2:]]
    guide = (ROOT / "docs/kernels.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", guide, re.M)
    assert sorted(rows) == sorted([*operations, "count_high"])
    shown = "".join(block.text for block in blocks(guide))
    # Which the calls that attend make themselves.
    assert all(f"{name}(" in shown for name in rows if name != "merge_parts")
