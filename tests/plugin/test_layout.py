"""The tree: who may import whom, what is packaged, and how large files are."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("kascade_sglang", "kernels", "patches")

# From the ground up. A module may import its own package and whatever stands on a lower line;
# ``kascade_sglang`` is the package's own ``__init__.py``.
LAYERS = """
    kascade_kernels
    errors
    settings
    kascade_sglang
    files provenance
    plan text
    config servers
    asks
    host sparsity
    backend checks calibration
    kascade_patches evaluation
    plugin doctor
    cli demo bench
"""

# When an import happens.
START, CALL, TYPES = "as the module loads", "as a function runs", "for type checkers"


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(node: ast.AST, when: str = START) -> Iterator[tuple[str, str]]:
    """Yield what a syntax tree imports, as dotted names, and when."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "relative imports hide what is imported"
            yield from ((f"{child.module}.{alias.name}", when) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from imports(child, TYPES)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(child, CALL if inside else when)


def imported(path: Path) -> Iterator[str]:
    """Yield what a file imports; what is for type checkers only is left out."""
    return (name for name, when in imports(ast.parse(path.read_text())) if when != TYPES)


def importers(package: str, *folders: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in python_files(*folders)
        if any(name.split(".")[0] == package for name in imported(path))
    }


def test_kernels_know_no_engine() -> None:
    assert not importers("sglang", "kernels") | importers("kascade_sglang", "kernels")


def test_sglang_is_named_in_the_host_package_and_the_patches() -> None:
    host = {f"kascade_sglang/host/{name}.py" for name in ("command_line", "runtime", "server")}
    assert importers("sglang", "kascade_sglang") == host | {"kascade_sglang/bench.py"}
    bench = [name for name in imported(ROOT / "kascade_sglang/bench.py") if "." in name]
    assert bench == ["sglang.srt.plugins.load_plugins"]


HOST_OBJECTS = ("ForwardBatch", "MHATokenToKVPool", "ModelRunner", "RadixAttention")


def reads_of_host_objects(*files: Path) -> list[str]:
    """Return where a function reads an attribute of an argument that is an object of SGLang's."""
    functions = [
        (path.name, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    found = []
    for file, function in functions:
        kinds = {each.arg: ast.unparse(each.annotation or each) for each in function.args.args}
        named = {arg for arg, kind in kinds.items() if any(name in kind for name in HOST_OBJECTS)}
        found += [
            f"{file}: {ast.unparse(node)}"
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute)
            and ast.unparse(node.value).removeprefix("self._") in named
        ]
    return found


def test_objects_of_sglang_are_read_in_the_host_package_alone() -> None:
    """Others hand them on; SGLang calls a backend with them."""
    ours = python_files("kascade_sglang")
    host = [path for path in ours if path.parent.name == "host"]
    assert "steps.py: batch.out_cache_loc" in reads_of_host_objects(*host)
    assert reads_of_host_objects(*(path for path in ours if path not in host)) == []


def test_helpers_of_tests_and_benchmarks_are_imported_by_their_full_names() -> None:
    files = python_files("tests", "benchmarks")
    names = {path.stem for path in files}
    for path in files:
        assert not names & {name.split(".")[0] for name in imported(path)}, path
        assert path == Path(__file__) or "sys.path" not in path.read_text(), path


def test_plans_load_without_torch() -> None:
    assert not importers("torch", "kascade_sglang/plan")
    budget = imported(ROOT / "kernels/kascade_kernels/budget.py")
    assert "torch" not in {name.split(".")[0] for name in budget}


def test_the_shared_name_kernels_is_left_to_its_owner() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    from kernels import get_kernel

    assert callable(get_kernel)


Edges = dict[tuple[str, str], set[str]]


def edges(*packages: Path) -> Edges:
    """Return {(module, module that it imports): when} within some packages."""
    files = {}
    for package in packages:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            files[".".join(parts).removesuffix(".__init__")] = path
    found: Edges = defaultdict(set)
    for module, path in files.items():
        for name, when in imports(ast.parse(path.read_text())):
            target = name if name in files else name.rpartition(".")[0]
            if target in files and target != module:
                found[module, target].add(when)
    return found


def circles(found: Edges, *times: str) -> list[list[str]]:
    """Return the modules that import one another, in groups, by the imports of these times."""
    targets: dict[str, set[str]] = defaultdict(set)
    for (module, target), when in found.items():
        if when & set(times):
            targets[module].add(target)

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        ahead = {module}
        while ahead:
            ahead = set().union(*(targets.get(name, set()) for name in ahead)) - seen
            seen |= ahead
        return seen

    reach = {module: reached(module) for module in targets}
    groups = {
        tuple(sorted(other for other in reach[module] if module in reach.get(other, ())))
        for module in reach
        if module in reach[module]
    }
    return sorted(map(list, groups))


def upward(found: Edges) -> list[str]:
    """Return the imports of what stands higher, or on the same line, as sentences."""
    lines = [line.split() for line in LAYERS.split("\n")]
    height = {name: number for number, line in enumerate(lines) for name in line}

    def part(module: str) -> str:
        return module.removeprefix("kascade_sglang.").split(".")[0]

    unknown = {part(module) for pair in found for module in pair} - set(height)
    assert not unknown, f"give {unknown} a line in LAYERS"
    return sorted(
        f"{module} imports {target} {' and '.join(sorted(when))}"
        for (module, target), when in found.items()
        if part(module) != part(target) and height[part(module)] <= height[part(target)]
    )


@pytest.fixture(scope="module")
def our_edges() -> Edges:
    return edges(
        ROOT / "kascade_sglang", ROOT / "kernels/kascade_kernels", ROOT / "patches/kascade_patches"
    )


def test_no_module_imports_itself_through_others(our_edges: Edges) -> None:
    assert circles(our_edges, START) == []
    assert circles(our_edges, START, CALL) == [], "circles that imports inside functions close"


def test_no_module_imports_what_stands_on_it(our_edges: Edges) -> None:
    assert upward(our_edges) == []


def test_a_circle_and_an_upward_import_are_found(tmp_path: Path) -> None:
    package = tmp_path / "kascade_sglang"
    texts = {
        "__init__": "",
        "errors": "from kascade_sglang.plan import a",
        "plan/__init__": "",
        "plan/a": "from kascade_sglang.plan.b import name",
        "plan/b": "def late():\n    import kascade_sglang.plan.c",
        "plan/c": "from kascade_sglang.plan import a\nimport kascade_sglang.errors",
    }
    for name, text in texts.items():
        path = package / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = edges(package)
    assert circles(found, START) == []
    letters = [f"kascade_sglang.plan.{letter}" for letter in "abc"]
    assert circles(found, START, CALL) == [["kascade_sglang.errors", *letters]]
    assert upward(found) == [f"kascade_sglang.errors imports {letters[0]} {START}"]
    (package / "plan/b.py").write_text("import kascade_sglang.plan.a")
    assert circles(edges(package), START) == [letters[:2]]
    (package / "unheard_of.py").write_text("import kascade_sglang.errors")
    with pytest.raises(AssertionError, match="unheard_of"):
        upward(edges(package))


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
    patches = kascade_patches
    some = patches.WITHOUT_GPU + patches.INFORMING + patches.OF_SINKS + patches.OF_NGRAM
    for module in patches.EVERYWHERE + some + patches.OF_HICACHE:
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
