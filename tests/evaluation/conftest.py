"""The demo model's tokenizer, files of every kind of data, and the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kascade_sglang import cli
from kascade_sglang.evaluation.longbench import datasets
from kascade_sglang.evaluation.tokens import Tokens
from kascade_sglang.servers.demo_model import MODEL
from tests.support.stub import Stub, WordTokenizer


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    return Tokens.load(str(MODEL))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with squad.json, aime.jsonl and a file for every dataset of LongBench."""
    qas = [{"question": "Who sang?", "answers": [{"text": "Ada"}, {"text": "Ada Bell"}]}]
    qas.append({"question": "Why?", "answers": [], "is_impossible": True})
    paragraphs = [{"context": "Ada sang all day.", "qas": qas}]
    paragraphs += [{"context": f"Passage {i} tells of rain.", "qas": []} for i in range(400)]
    squad = {"data": [{"title": "t", "paragraphs": paragraphs}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    problems = [{"problem": f"What is {i} + 1?", "answer": f"{i + 1:03d}"} for i in range(4)]
    (tmp_path / "aime.jsonl").write_text("\n".join(map(json.dumps, problems)) + "\n")
    for name, recipe in datasets().items():
        answers = {"retrieval": ["Paragraph 3"], "number_share": ["7"], "classification": ["City"]}
        rows = [
            {
                "input": f"question {i} of {name}?",
                "context": f"A text {i} with many words. " * 20,
                "answers": answers.get(recipe["metric"], [f"blue house {i}"]),
                "length": 100,
                "dataset": name,
                "language": "en",
                "all_classes": ["City", "Date"] if recipe["metric"] == "classification" else None,
                "_id": f"{name}-{i}",
            }
            for i in range(3)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def kascade_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Stub | str, str, str], int]:
    """Run ``kascade eval`` against a stub, counting words as tokens; returns the exit status."""
    monkeypatch.setattr(Tokens, "load", classmethod(lambda cls, *_: cls(WordTokenizer())))

    def run(server: Stub | str, tasks: str, *options: str) -> int:
        url = server if isinstance(server, str) else server.url
        common = ["--url", url, "--tasks", tasks, "--tokenizer", "words", "--samples", "3"]
        out = [] if "--out" in options else ["--out", str(tmp_path / "results.csv")]
        return cli.main(["eval", *common, *out, *options])

    return run
