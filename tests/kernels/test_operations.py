"""Operations and kernels' arguments have one name everywhere: kernels/README.md lists them."""

import ast
import csv
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels/kascade_kernels"


class Operation(NamedTuple):
    """A line of the table; what stands in backticks of each cell but the first."""

    wrapper: list[str]
    body: list[str]
    reference: list[str]
    test: list[str]
    benchmark_row: str


def operations() -> list[Operation]:
    lines = (ROOT / "kernels/README.md").read_text().split("| operation |")[1].splitlines()[2:]
    table = lines[: lines.index("")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [
        Operation(*(re.findall(r"`(\w+)`", cell) for cell in row[1:5]), row[5]) for row in cells
    ]


def functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def bodies() -> list[tuple[ast.FunctionDef, list[str]]]:
    """Kernels, with the lines of their files."""
    return [
        (node, path.read_text().splitlines())
        for path in sorted((KERNELS / "_triton").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]


def words() -> set[str]:
    """Numbers and constants that the second table explains."""
    table = (ROOT / "kernels/README.md").read_text().split("| name |")[1].split("\n\n")[0]
    return set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:]))
    )


OPERATIONS = operations()


def test_every_kernel_belongs_to_an_operation_in_the_table() -> None:
    with_kernels = {
        path.stem.removeprefix("_")
        for path in (KERNELS / "_triton").glob("*.py")
        if any(name.endswith("_kernel") for name in functions(path))
    }
    assert sorted(with_kernels) == sorted(name for row in OPERATIONS for name in row.wrapper)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.wrapper[0])
def test_an_operation_has_one_name(operation: Operation) -> None:
    (name,) = operation.wrapper
    assert operation.reference == [name] and operation.test == [f"test_{name}"]
    assert name in functions(KERNELS / f"{name}.py")
    bodies = functions(KERNELS / f"_triton/_{name}.py")
    assert operation.body == [body for body in bodies if body.endswith("_kernel")]
    assert name in functions(KERNELS / "reference.py")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.wrapper[0])
def test_its_test_uses_its_reference(operation: Operation) -> None:
    """By itself, or through the cases that tests of kernels share."""
    (name,) = operation.wrapper
    test = (ROOT / f"tests/kernels/test_{name}.py").read_text()
    for case in ("tile_case", "decode_case"):
        if f"support.{case}" in test:
            test += (ROOT / f"tests/support/{case}.py").read_text()
    assert f"reference.{name}(" in test


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.wrapper[0])
def test_its_benchmark_rows_were_measured(operation: Operation) -> None:
    bench = ""
    rows = re.findall(r"(prefill|decode)|`(\w+)`", operation.benchmark_row)
    assert any(kind for _, kind in rows)
    for named, kind in rows:
        bench = named or bench
        if kind:
            with (ROOT / f"benchmarks/results/{bench}_h100.csv").open() as lines:
                assert kind in {row["kind"] for row in csv.DictReader(lines)}


@pytest.mark.parametrize("body", bodies(), ids=lambda body: body[0].name)
def test_a_body_says_its_grid_and_shapes(body: tuple[ast.FunctionDef, list[str]]) -> None:
    """Every argument that the README does not explain as a number is a pointer with a shape."""
    node, lines = body
    first = next(line for line in lines[node.body[0].lineno - 2 :] if "#" in line)
    assert first.strip().startswith("# Grid: (")
    for argument in node.args.args:
        name, line = argument.arg, lines[argument.lineno - 1]
        if argument.annotation is not None:
            assert name.isupper() and name in words()
        elif name.startswith("stride_"):
            assert re.fullmatch(r"stride_[a-z]+(_head|_list)?", name)
        elif name not in words():
            assert re.search(r"# .*\[[^\]]+\]", line) and not name.endswith("_ptr"), name
