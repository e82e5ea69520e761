"""The demo's questions about planted facts, which the demo model was trained to answer."""

import math
import random
from functools import partial

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.samples import Order, Sample, Task
from kascade_sglang.text.documents import (
    MAX_TOKENS,
    TASKS,
    Document,
    Question,
    is_correct,
    make_document,
    prompt,
)

PREFIX = "facts_"
QUESTIONS = 5
"""Of each kind about one document, which is the same in every task, so its prefix is cached."""


def _score(reply: str, question: Question) -> float:
    return float(is_correct(question, reply))


def _documents(order: Order) -> list[Document]:
    """As many as ``order.count`` questions of each kind need."""
    questions = min(QUESTIONS, order.count)
    # The question, and the blank line before it, have at most about 40 tokens.
    length = order.length - order.tokens.overhead - MAX_TOKENS - 40
    found = []
    for index in order.numbers(math.ceil(order.count / questions)):
        seed = random.Random(f"{order.length}-{order.seed}-{index}").getrandbits(48)
        try:
            found.append(make_document(seed, length, order.tokens.count, questions))
        except ValueError as error:
            raise EvaluationError(f"facts at {order.length} tokens: {error}") from error
    return found


def _make(kind: str, order: Order) -> list[Sample]:
    documents = _documents(order)
    asked = [[q for q in document.questions if q.task == kind] for document in documents]
    samples = []
    for index in order.numbers():
        # In turns: requests in flight are about several documents.
        turn, which = divmod(index, len(documents))
        question = asked[which][turn]
        text = prompt(documents[which].text, question.text)
        score = partial(_score, question=question)
        tokens = order.tokens.count(text)
        samples.append(Sample(text, (question.answer,), tokens, MAX_TOKENS, score))
    return samples


def facts_tasks() -> list[Task]:
    """One task for each kind of question."""
    return [Task(PREFIX + kind, partial(_make, kind), True, "accuracy") for kind in TASKS]
