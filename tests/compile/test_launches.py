"""Every kernel takes its launch from the table."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.compiler import ASTSource

import kascade_kernels
from kascade_kernels.tuning import DEFAULT, TABLE, Launch
from tests.compile.test_compile import launch_decode, launch_prefill
from tests.support.capture import instead_of_launching

FOLDER = Path(kascade_kernels.__file__).parent


def kernels() -> set[str]:
    """Names of all jit bodies that wrappers launch."""
    functions = (
        node.name.removesuffix("_kernel")
        for path in (FOLDER / "_triton").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    )
    return set(functions)


def test_every_kernel_has_rows() -> None:
    assert {name.split(".")[0] for name in TABLE} == kernels()


def test_launches_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel gets a number of stages of its own in the table; every launch then has it."""
    names = list(TABLE)
    for index, (name, rows) in enumerate(list(TABLE.items())):
        first = rows[0][1]
        block = first.block and first.block // 2
        launch = first._replace(num_warps=2, num_stages=10 + index, block=block)
        monkeypatch.setitem(TABLE, name, [(DEFAULT, launch)])
    seen = set()

    def act(source: ASTSource, options: Any) -> None:
        name = names[options.num_stages - 10]
        assert f"{name.split('.')[0]}_kernel" == source.fn.__name__
        launch: Launch = TABLE[name][0][1]
        assert options.num_warps == 2
        constants = {source.fn.arg_names[at[0]]: value for at, value in source.constants.items()}
        if launch.block:
            assert constants["BLOCK"] == launch.block
        if launch.span:
            assert constants["SPAN"] == launch.span
        seen.add(name)

    with instead_of_launching(90, act):
        launch_decode(torch.bfloat16, 128, 4)
        launch_decode(torch.bfloat16, 128, 4, torch.float8_e4m3fn)
        launch_prefill(torch.bfloat16, 128, 4)
    assert seen == set(names)


def test_no_wrapper_has_a_number_of_its_own() -> None:
    """Warps and stages are named in the table alone."""
    for path in FOLDER.glob("*.py"):
        if path.name != "tuning.py":
            assert "num_warps" not in path.read_text(), path.name
