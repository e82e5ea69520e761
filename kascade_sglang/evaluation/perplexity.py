"""Perplexity of the last tokens of a long text, from the log probabilities of SGLang's /generate.

Only the end of each text counts, so that every token counted has a long context; and few tokens,
because a server holds a row of the vocabulary for each.
"""

import math
import random
from functools import partial
from pathlib import Path

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation import haystack
from kascade_sglang.evaluation.data_files import read_text
from kascade_sglang.evaluation.intervals import bootstrap
from kascade_sglang.evaluation.samples import Order, Sample, Task

MOST_SCORED = 512
NAME = "perplexity"


def scored_tokens(length: int) -> int:
    """How many of a text's tokens count: the last quarter, at most 512."""
    return min(MOST_SCORED, length // 4)


def _unscored(reply: str) -> float:
    raise AssertionError("perplexity has no score of a reply")


def _read(path: Path) -> str:
    text = read_text(path, f"--text {path}")
    if not text.strip():
        raise EvaluationError(f"--text {path}: empty")
    return text


def _make(path: Path | None, order: Order) -> list[Sample]:
    text = " ".join(haystack.book()) if path is None else _read(path)
    ids = order.tokens.encode(text)
    start = order.tokens.start
    size = order.length - len(start) - 1  # the server makes one token before it answers
    if size > len(ids) or size < 16:
        raise EvaluationError(
            f"{NAME} at {order.length} tokens: expected 32 to {len(ids)}, what the text has"
        )
    rng = random.Random(f"{NAME}-{order.length}-{order.seed}")
    samples = []
    for _ in order.numbers():
        place = rng.randrange(len(ids) - size + 1)
        window = (*start, *ids[place : place + size])
        scored = scored_tokens(order.length)
        samples.append(
            Sample("", (), len(window), 1, _unscored, raw=True, ids=window, scored_tokens=scored)
        )
    return samples


def perplexity_interval(losses: list[float]) -> tuple[float, float, float]:
    """Perplexity and its interval from the mean loss of each text, in nats a token."""
    low, high = bootstrap(losses)
    return math.exp(math.fsum(losses) / len(losses)), math.exp(low), math.exp(high)


def perplexity_task(path: Path | None) -> Task:
    """The task ``perplexity`` over a text file, or over the bundled books."""
    return Task(NAME, partial(_make, path), True, NAME, path.name if path else "bundled books")
