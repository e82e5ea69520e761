"""Say that Triton is not available where there is no GPU.

Why: SGLang decides by the backend's name, and runs Triton kernels for any name it does not know.
How: around the question, answer no. Registered only on machines without a GPU.
Remove when: SGLang asks the platform (its 0.5.23 does).
"""

from collections.abc import Callable

TARGET = "sglang.srt.utils.common.support_triton"
KIND = "AROUND"


def hook(original: Callable[[str], bool], backend: str) -> bool:
    """Answer for any backend."""
    return False
