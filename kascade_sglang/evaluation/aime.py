r"""AIME from a local file of JSON lines with ``problem`` and ``answer``, answered in \boxed{}."""

import random
import re
from functools import partial
from pathlib import Path

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.data_files import read_jsonl
from kascade_sglang.evaluation.samples import Order, Sample, Task
from kascade_sglang.evaluation.scorers import boxed_match

ASK = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def _answer(path: Path, number: int, text: object) -> int:
    """Answers are whole numbers from 0 to 999, sometimes written with leading zeros."""
    if not re.fullmatch(r"\d{1,3}", str(text).strip()):
        raise EvaluationError(f"{path}: answer of object {number}: expected 0 to 999, got {text!r}")
    return int(str(text))


def _make(path: Path, order: Order) -> list[Sample]:
    samples = []
    for number, row in enumerate(read_jsonl(path, ("problem", "answer")), 1):
        answer = _answer(path, number, row["answer"])
        if not isinstance(row["problem"], str):
            raise EvaluationError(
                f"{path}: problem of object {number}: expected a text, got {row['problem']!r}"
            )
        prompt = ASK.format(problem=row["problem"])
        score = partial(boxed_match, answer=answer)
        samples.append(Sample(prompt, (str(answer),), order.tokens.count(prompt), None, score))
    if order.count < len(samples):
        samples = random.Random(f"aime-{order.seed}").sample(samples, order.count)
    return samples


def aime_task(path: Path) -> Task:
    """The task ``aime`` over a file, whose replies may be as long as the context allows."""
    return Task("aime", partial(_make, path), False, "accuracy", path.name)
