"""Which of SGLang's backends computes what is not sparse."""

from importlib.util import find_spec

import torch

from kascade_sglang.errors import KascadeError

DENSE_BACKENDS = ("fa3", "flashinfer", "triton", "torch_native")
"""Those that run with any page size; SGLang picks others' pages by the server's backend name."""

FP8_TYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Types of a KV cache in 8 bits, by the names that ``--kv-cache-dtype`` knows."""

SCALING = ("fa3", "triton")
"""Those that apply a layer's k_scale and v_scale to all that they read of an fp8 cache. (SGLang
0.5.17's flashinfer does so but for cached prefixes.)"""

WITH_SINKS = ("fa3", "triton")
"""Those that take a model's attention sinks."""

LIBRARIES = {"fa3": "sgl_kernel", "flashinfer": "flashinfer", "triton": "triton"}
"""What SGLang imports for a backend when it builds one."""


def default_dense_backend() -> str:
    """Return the in-tree backend that this machine's hardware calls for."""
    if not torch.cuda.is_available():
        return "torch_native"
    return "fa3" if torch.cuda.get_device_capability() == (9, 0) else "flashinfer"


def require_dense_backend(name: str | None) -> None:
    """Raise KascadeError unless ``name`` is None or one that works below Kascade."""
    if name is not None and name not in DENSE_BACKENDS:
        known = ", ".join(DENSE_BACKENDS)
        raise KascadeError(f"dense_backend: expected one of {known}, got {name!r}")


def missing_library(name: str) -> str | None:
    """Return the module that a dense backend needs, where this Python lacks it."""
    library = LIBRARIES.get(name)
    return None if library is None or find_spec(library) is not None else library
