"""Say in one sentence that a step found no GPU memory, and what to change.

Why: the scheduler ends by torch's error, which speaks of allocators and names no flag of SGLang's.
How: around a step; the same error is raised anew, its message is the sentence and what torch said.
    Hooked when a backend is built; nothing depends on it.
Remove when: SGLang says so itself.
"""

from collections.abc import Callable
from typing import Any

import torch

from kascade_sglang.errors import sentence

TARGET = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
KIND = "AROUND"


def hook(
    original: Callable[..., Any], runner: Any, batch: Any, *arguments: object, **named: object
) -> Any:
    """Compute a step; raises torch.OutOfMemoryError with our sentence."""
    try:
        return original(runner, batch, *arguments, **named)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"kascade: GPU memory: expected room for a step of {len(batch.input_ids)} new tokens "
            f"beside weights and KV pool, got too little; lower --mem-fraction-static or "
            f"--chunked-prefill-size. torch says: {sentence(error)}"
        ) from error
