"""Leave room for the scratch that kernels write.

Why: the pool takes what memory is left, and a backend allocates its scratch after it.
How: around the computation of the pool's size, take the scratch off what is available.
Remove when: backends can declare the memory they need.
"""

from collections.abc import Callable
from typing import Any

TARGET = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator.calculate_pool_sizes"
KIND = "AROUND"


def hook(
    original: Callable[..., Any], configurator: Any, available_bytes: int, page_size: int
) -> Any:
    """Return the pool's size for what is left."""
    scratch = getattr(configurator, "kascade_scratch", 0)
    return original(configurator, max(available_bytes - scratch, 0), page_size)
