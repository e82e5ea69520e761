"""Compile what wrappers launch, for GPUs that are not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@contextmanager
def compiled_launches(capability: int) -> Iterator[list[Any]]:
    """Collect the compiled kernels instead of running them; specialised as a launch would be."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    compiled = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs["debug"] = False
        kwargs["instrumentation_mode"] = ""
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constexprs, attrs = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constexprs, attrs)
        compiled.append(triton.compile(source, target=target, options=options.__dict__))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = original
