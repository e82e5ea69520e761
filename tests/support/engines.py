"""``sglang.Engine`` in this process: a model is served without another process for HTTP."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sglang

from tests.support.requests import sampling


@contextmanager
def engine_of(model: Path, **settings: object) -> Iterator[sglang.Engine]:
    """Serve a model folder in float32 with these settings of Kascade."""
    engine = sglang.Engine(
        model_path=str(model),
        attention_backend="kascade",
        json_model_override_args=json.dumps({"kascade": settings}),
        dtype="float32",
        page_size=32,
        chunked_prefill_size=512,
        max_total_tokens=16384,
        mem_fraction_static=0.5,
        log_level="warning",
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def continue_all(engine: sglang.Engine, prompts: list[list[int]], tokens: int) -> list[Any]:
    """Continue prompts greedily, all at once; replies are those of /generate."""
    return engine.generate(input_ids=prompts, sampling_params=sampling(tokens), return_logprob=True)
