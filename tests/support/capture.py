"""What wrappers launch, compiled for GPUs that are not there, or only named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@contextmanager
def instead_of_launching(capability: int, act: Callable[[ASTSource, Any], None]) -> Iterator[None]:
    """Call ``act(source, options)`` for every launch; specialised as the launch would be."""
    backend = make_backend(GPUTarget("cuda", capability, 32))

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs["debug"] = False
        kwargs["instrumentation_mode"] = ""
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constexprs, attrs = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        act(ASTSource(kernel, signature, constexprs, attrs), options)

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


@contextmanager
def compiled_launches(capability: int) -> Iterator[list[Any]]:
    """Collect the compiled kernels instead of running them."""
    target, compiled = GPUTarget("cuda", capability, 32), []

    def act(source: ASTSource, options: Any) -> None:
        compiled.append(triton.compile(source, target=target, options=options.__dict__))

    with instead_of_launching(capability, act):
        yield compiled


@contextmanager
def launched_variants(capability: int) -> Iterator[set[str]]:
    """Collect what would be compiled, without doing so: one entry for each variant."""
    variants = set()

    def act(source: ASTSource, options: Any) -> None:
        variants.add(f"{source.fn.__name__} {source.hash()} {options.hash()}")

    with instead_of_launching(capability, act):
        yield variants
