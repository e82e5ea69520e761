"""What Triton's interpreter lacks to run the kernels on a CPU: bfloat16, NaN, and speed."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kascade_kernels import tuning


def compute_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend bfloat16 and NaN, and what takes the interpreter's time."""
    add_bfloat16(monkeypatch)
    leave_out_nan(monkeypatch)
    patch_once(monkeypatch)


def add_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply bfloat16, and round to it."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", _cast_impl)


def multiply_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a row of a product have the same bits at every place, as on GPUs.

    On a CPU they depend on the place. Products in float64 make no difference that is left in
    float32.
    """
    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, added: Any, *others: Any) -> TensorHandle:
        if not a.dtype.is_floating():
            return multiply(self, a, b, added, *others)
        operands = (self.cast_impl(each, tl.float32).data.astype(np.float64) for each in (a, b))
        product = np.matmul(*operands).astype(np.float32)
        return TensorHandle(product + added.data, added.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def leave_out_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the greater of NaN and a number be the number, as on GPUs; so the lesser."""
    for name, of_two in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(InterpreterBuilder, name, _pairwise(of_two))


def _pairwise(of_two: np.ufunc) -> Callable[..., TensorHandle]:
    return lambda self, left, right: self.binary_op(left, right, of_two)


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a launch patch each module of Triton's language once, not at every call of a function.

    That was a third of the interpreter's time.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[object] = set()
    modules: dict[object, set[object]] = {}

    def patch_new(function: Any) -> Any:
        if function not in modules:
            modules[function] = {tl, tl.core} & _modules(function.__globals__)
        if modules[function] <= patched:
            return None
        patched.update(modules[function])
        return patch(function)

    def begin(*args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(*args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_new)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", begin)


def _modules(names: dict[str, Any]) -> set[object]:
    return {value for value in names.values() if isinstance(value, ModuleType)}


def leave_out_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split rows less finely: programs without keys take the interpreter milliseconds, too."""
    tune(monkeypatch, "score", most=8)
    tune(monkeypatch, "attend", most=8)
    tune(monkeypatch, "compare_slots", per_row=1)
    monkeypatch.setattr(tuning, "INVARIANT_SPLITS", 4)


def tune(monkeypatch: pytest.MonkeyPatch, name: str, **values: int) -> None:
    """Change what the table says about a kernel, or about how lists are cut."""
    table = tuning.CUTS if name in tuning.CUTS else tuning.TABLE
    rows = [(where, value._replace(**values)) for where, value in table[name]]
    monkeypatch.setitem(table, name, rows)


_plain_dot, _plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _create_dot(self: Any, a: Any, b: Any, *others: Any) -> TensorHandle:
    """Multiply bfloat16, which the interpreter keeps as uint16, as the float32 it stands for."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
    return _plain_dot(self, a, b, *others)


def _cast_impl(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
    """Round to the nearest bfloat16, as GPUs do; the interpreter cuts off."""
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _plain_cast(self, source, dtype)
