"""The demo's questions about planted facts, which the demo model was trained to answer."""

import random
from functools import partial

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.samples import Order, Sample, Task
from kascade_sglang.text.documents import (
    MAX_TOKENS,
    TASKS,
    Question,
    is_correct,
    make_document,
    prompt,
)

PREFIX = "facts_"


def _score(reply: str, question: Question) -> float:
    return float(is_correct(question, reply))


def _make(kind: str, order: Order) -> list[Sample]:
    samples = []
    for index in range(order.count):
        seed = random.Random(f"{kind}-{order.length}-{order.seed}-{index}").getrandbits(48)
        # The question, and the blank line before it, have at most about 40 tokens.
        length = order.length - order.tokens.overhead - MAX_TOKENS - 40
        try:
            document = make_document(seed, length, order.tokens.count, 1, (kind,))
        except ValueError as error:
            raise EvaluationError(f"{PREFIX}{kind} at {order.length} tokens: {error}") from error
        question = document.questions[0]
        text = prompt(document.text, question.text)
        score = partial(_score, question=question)
        tokens = order.tokens.count(text)
        samples.append(Sample(text, (question.answer,), tokens, MAX_TOKENS, score))
    return samples


def facts_tasks() -> list[Task]:
    """One task for each kind of question."""
    return [Task(PREFIX + kind, partial(_make, kind), True, "accuracy") for kind in TASKS]
