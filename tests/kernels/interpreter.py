"""What Triton's interpreter needs to run the kernels on a CPU, in bfloat16 and in little time."""

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kascade_kernels import decode_spans

INTERPRETED = triton.knobs.runtime.interpret
KERNELS_RUN = INTERPRETED or torch.cuda.is_available()
needs_kernels = pytest.mark.skipif(
    not KERNELS_RUN, reason="kernels run on a GPU, or on a CPU with TRITON_INTERPRET=1"
)


def prepare_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add products of bfloat16, and leave out most programs: each takes milliseconds."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", _cast_impl)
    monkeypatch.setattr(decode_spans, "SCORE_SPLITS", 8)
    monkeypatch.setattr(decode_spans, "ATTEND_SPLITS", 8)


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
