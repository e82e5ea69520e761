"""`python -m build` makes a wheel that holds everything, and that works where it is installed."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kascade_sglang

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"kascade_sglang": ROOT, "kernels": ROOT / "kernels", "patches": ROOT / "patches"}
DATA = ("data", "model")
"""Folders of a package whose files are installed with it."""

pytest.importorskip("build")
pytest.importorskip("setuptools", minversion="77")


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist, and the wheel from it, from a copy of what they are made of."""
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, source / folder, ignore=unwanted)
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    run("-m", "build", "--no-isolation", cwd=source, PYTHONPATH="")
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_names_and_version_are_said_once(built: Path, wheel: Path) -> None:
    release = kascade_sglang.__version__
    assert wheel.name == f"kascade_sglang-{release}-py3-none-any.whl"
    assert (built / f"kascade_sglang-{release}.tar.gz").is_file()
    with_release = [
        name
        for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "Makefile")
        if f"{release}" in (ROOT / name).read_text()
    ]
    assert with_release == [], "the version stands in kascade_sglang/__init__.py alone"
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert newest.split()[0] == release


def test_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    expected = set()
    for folder, root in SOURCES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py" or (path.is_file() and path.parent.name in DATA):
                expected.add(str(path.relative_to(root)))
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    assert held == expected
    # `kernels` is another project's name.
    assert {name.split("/")[0] for name in held} == {
        "kascade_sglang",
        "kascade_kernels",
        "kascade_patches",
    }


def test_entry_points_are_those_declared(wheel: Path) -> None:
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    held = configparser.ConfigParser(delimiters=["="])
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith("entry_points.txt")]
        held.read_string(file.read(name).decode())
    for group, text in declared["options.entry_points"].items():
        pairs = [line.split(" = ") for line in text.strip().splitlines()]
        assert dict(held[group]) == dict(pairs)
    assert len(held.sections()) == len(declared["options.entry_points"]) == 3


INSTALLED = """
import sys
from importlib.metadata import distribution
from pathlib import Path

import kascade_kernels
import kascade_patches
import kascade_sglang
from kascade_sglang.plan.library import shipped_plans
from kascade_sglang.servers.demo_model import MODEL

home = Path(sys.argv[1])
for module in (kascade_kernels, kascade_patches, kascade_sglang):
    assert Path(module.__file__).is_relative_to(home), module
assert shipped_plans() and (MODEL / "model.safetensors").is_file()
points = distribution("kascade-sglang").entry_points
print(*sorted(point.load().__name__ for point in points))
"""


def test_an_installed_wheel_is_imported_from_its_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "installed"
    flags = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(home))
    run("-m", "pip", "install", *flags, str(wheel), cwd=tmp_path)
    out = run("-c", INSTALLED, str(home), cwd=tmp_path, PYTHONPATH=str(home))
    assert out.split() == ["activate", "main", "register"]
