"""The tree: who may import whom, what is packaged, and how large files are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("kascade_sglang", "kernels", "patches")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path, at_run_time: bool = True) -> Iterator[str]:
    """Yield the modules a file imports; those for type checkers only are left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if at_run_time and id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def importers(package: str, *folders: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in python_files(*folders)
        if any(name.split(".")[0] == package for name in imported(path))
    }


def test_kernels_know_no_engine() -> None:
    assert not importers("sglang", "kernels") | importers("kascade_sglang", "kernels")


def test_sglang_is_named_in_the_host_package_and_the_patches() -> None:
    host = {"kascade_sglang/host/runtime.py", "kascade_sglang/host/server.py"}
    assert importers("sglang", "kascade_sglang") == host | {"kascade_sglang/bench.py"}
    bench = imported(ROOT / "kascade_sglang/bench.py")
    assert [name for name in bench if name.startswith("sglang")] == ["sglang.srt.plugins"]


def test_plans_load_without_torch() -> None:
    assert not importers("torch", "kascade_sglang/plan")
    assert "torch" not in set(imported(ROOT / "kernels/kascade_kernels/budget.py"))


def test_the_shared_name_kernels_is_left_to_its_owner() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    from kernels import get_kernel

    assert callable(get_kernel)


def test_every_package_and_its_data_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    # Of setuptools, where Python has none of its own.
    from distutils.core import run_setup

    monkeypatch.chdir(ROOT)
    setup = run_setup("setup.py", stop_after="config")
    homes = {
        folder: folder.relative_to(ROOT / root)
        for root in (".", "kernels", "patches")
        for folder in {path.parent for path in (ROOT / root).glob("kascade_*/**/*.py")}
    }
    assert set(setup.packages) == {".".join(home.parts) for home in homes.values()}
    for folder, home in homes.items():
        data = {path for kept in ("data", "model") for path in (folder / kept).glob("*")}
        patterns = setup.package_data.get(".".join(home.parts), [])
        assert data == {path for pattern in patterns for path in folder.glob(pattern)}, home


def test_every_patch_is_registered_and_explained() -> None:
    import kascade_patches

    register = (ROOT / "patches/README.md").read_text()
    for module in kascade_patches.EVERYWHERE + kascade_patches.WITHOUT_GPU:
        assert f"`{module.TARGET}`" in register
        for word in ("Why:", "How:", "Remove when:"):
            assert word in module.__doc__


@pytest.mark.parametrize("path", python_files(*SOURCES, "tests"), ids=lambda path: path.name)
def test_files_and_functions_fit_a_reader(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # A kernel's signature, one commented argument a line, takes a screen of its own.
            jit = path.parent.name == "_triton"
            assert node.end_lineno - node.lineno < (120 if jit else 80), node.name
            if not jit and not str(path).startswith(str(ROOT / "tests")):
                untyped = [
                    a.arg
                    for a in node.args.args
                    if a.annotation is None and a.arg not in ("self", "cls")
                ]
                assert node.returns is not None and not untyped, node.name
