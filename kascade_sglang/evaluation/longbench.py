"""LongBench v1 (arXiv 2308.14508) from local files, ``<dataset>.jsonl`` as published.

Prompts, reply lengths and metrics are those of its repository (data/longbench.json). As there, a
prompt that does not fit has its middle cut out, and few-shot and code tasks get no chat template.
"""

import json
import os
import random
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation import scorers
from kascade_sglang.evaluation.data_files import read_jsonl
from kascade_sglang.evaluation.samples import Order, Sample, Task

DATA = Path(__file__).resolve().parent / "data/longbench.json"
PREFIX = "longbench_"
FIELDS = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
RAW = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
SCORES: dict[str, Callable[[str, str], float]] = {
    "qa_f1": scorers.qa_f1,
    "qa_f1_zh": scorers.qa_f1_zh,
    "rouge_l": scorers.rouge_l,
    "rouge_l_zh": scorers.rouge_l_zh,
    "number_share": scorers.number_share,
    "retrieval": scorers.retrieval,
    "code_similarity": scorers.code_similarity,
}


@lru_cache(maxsize=1)
def datasets() -> dict[str, dict[str, Any]]:
    """{dataset: {metric, max_tokens, prompt}} of LongBench's 21 datasets."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def best_score(
    reply: str, dataset: str, answers: Sequence[str], classes: Sequence[str] | None
) -> float:
    """The reply's best score against any of the answers, by the dataset's metric."""
    metric = datasets()[dataset]["metric"]
    if dataset in FIRST_LINE:
        reply = scorers.first_line(reply)
    if metric == "classification":
        return max(scorers.classification(reply, answer, classes or ()) for answer in answers)
    return max(SCORES[metric](reply, answer) for answer in answers)


def _make(dataset: str, path: Path, order: Order) -> list[Sample]:
    rows = read_jsonl(path, FIELDS)
    for number, row in enumerate(rows, 1):
        _check(row, datasets()[dataset]["metric"], f"{path}: object {number}")
    if order.count < len(rows):
        rows = random.Random(f"{dataset}-{order.seed}").sample(rows, order.count)
    if datasets()[dataset]["metric"].endswith("_zh"):
        scorers.qa_f1_zh("一", "一")  # refuses before anything is asked where jieba is missing
    return [_sample(dataset, row, order) for row in rows]


def _check(row: dict[str, Any], metric: str, where: str) -> None:
    """Refuse what could not be asked, or not be scored once a reply has come."""
    for field in ("context", "input"):
        if not isinstance(row[field], str):
            raise EvaluationError(f"{where}: {field}: expected a text, got {row[field]!r}")
    for field in ("answers", "all_classes") if metric == "classification" else ("answers",):
        texts = row[field]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise EvaluationError(f"{where}: {field}: expected a list of texts, got {texts!r}")
    if metric == "retrieval" and not all(scorers.DIGITS.search(text) for text in row["answers"]):
        raise EvaluationError(
            f"{where}: answers: expected a paragraph's number in each, got {row['answers']}"
        )


def _sample(dataset: str, row: dict[str, Any], order: Order) -> Sample:
    recipe, raw = datasets()[dataset], dataset in RAW
    prompt = recipe["prompt"].format(context=row["context"], input=row["input"])
    cut = False
    if order.limit is not None:
        # Texts that are cut may have a few more tokens when they are encoded again.
        spare = (0 if raw else order.tokens.overhead) + recipe["max_tokens"] + 16
        if order.limit <= spare:
            raise EvaluationError(f"{PREFIX}{dataset}: a context of {order.limit} is too short")
        prompt, cut = order.tokens.cut_middle(prompt, order.limit - spare)
    answers = tuple(row["answers"])
    score = partial(best_score, dataset=dataset, answers=answers, classes=row["all_classes"])
    tokens = order.tokens.count(prompt)
    return Sample(prompt, answers, tokens, recipe["max_tokens"], score, raw=raw, cut=cut)


def longbench_tasks(folder: Path) -> list[Task]:
    """A task for each of LongBench's files in a folder; raises EvaluationError if none is there."""
    if not os.path.isdir(folder):
        raise EvaluationError(f"--longbench {folder}: no such folder")
    found = [name for name in datasets() if (folder / f"{name}.jsonl").is_file()]
    if not found:
        raise EvaluationError(
            f"--longbench {folder}: holds none of LongBench's files (qasper.jsonl, ...)"
        )
    return [
        Task(
            PREFIX + name,
            partial(_make, name, folder / f"{name}.jsonl"),
            False,
            datasets()[name]["metric"],
            f"{name}.jsonl",
        )
        for name in found
    ]
