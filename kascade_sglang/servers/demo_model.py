"""The model of the demo, which tests and ``make eval`` serve too, and what it is served with."""

from pathlib import Path

import torch

# The files alone: the demo's code uses this package, never the other way round.
MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
MODEL_NAME = "kascade-demo"


def demo_arguments(backend: str, dense: str | None = None) -> list[str]:
    """Return the server's arguments for the demo model on this machine.

    dense: the backend that ``kascade`` composes, None for its default.
    Without a GPU: float32, which torch's CPU kernels are fastest in. Pages of one tile make a
    prefix-cache hit end where a tile ends.
    """
    arguments = ["--model-path", str(MODEL), "--served-model-name", MODEL_NAME]
    arguments += ["--attention-backend", backend, "--page-size", "32"]
    # The number of tokens bounds memory. A small fraction would count what other processes take
    # while the model loads, and refuse to start.
    arguments += ["--max-total-tokens", "65536", "--mem-fraction-static", "0.5"]
    # A model that was never taught JSON would fill it with spaces for ever.
    arguments += ["--constrained-json-disable-any-whitespace"]
    arguments += ["--enable-metrics", "--enable-cache-report", "--log-level", "warning"]
    if backend == "kascade" and dense:
        arguments += ["--kascade-dense-backend", dense]
    if not torch.cuda.is_available():
        arguments += ["--dtype", "float32", "--sleep-on-idle"]
    return arguments
