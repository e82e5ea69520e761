"""What ``kascade eval`` refuses: one sentence on stderr, exit status 1, and nothing asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.results import COLUMNS
from kascade_sglang.evaluation.tokens import Tokens
from tests.support.stub import serving

Eval = Callable[..., int]
HEADER = ",".join(COLUMNS)
OTHER_COLUMNS = "holds other columns; give a new file"
AIME = ["--aime", "FILE"]
SQUAD = ["--squad", "FILE"]
OUT = ["--out", "FILE"]
QA = '[{"question": "Who?", "answers": [{"text": %s}]}]'
PARAGRAPH = '{"data": [{"paragraphs": [{"context": "Ada.", "qas": %s}]}]}'
LONG = '{"problem": "%s", "answer": 1}' % ("word " * 5000)
ROW = '{"problem": "1 + 1?", "answer": "2"}\n'
HALF = '{"problem": "\\ud800", "answer": 1}'
EMPTY_ROW = ",".join({"n": "0", "score": "1", "low": "1", "high": "1"}.get(c, "") for c in COLUMNS)
REFUSALS = {
    "unknown task": ("nonsense", [], None, "--tasks nonsense: unknown; expected some of ruler"),
    "task without its file": ("aime", [], None, "--tasks aime: needs its data; give --aime"),
    "missing file": ("aime", AIME, None, "FILE: cannot read (No such file or directory)"),
    "malformed line": ("aime", AIME, ROW + "{oops\n", "FILE, line 2: no JSON"),
    "not an object": ("aime", AIME, ROW + "\n[1]\n", "FILE, line 3: expected an object"),
    "missing field": ("aime", AIME, '{"problem": "x"}\n', "FILE, line 1: no field 'answer'"),
    "wrong answer": ("aime", AIME, '{"problem": "x", "answer": "two"}\n', "expected 0 to 999"),
    "no problem": ("aime", AIME, '{"problem": null, "answer": 5}\n', "expected a text, got None"),
    "label in bytes": ("vt", ["--label", "\udcff"], None, "--label: expected text in UTF-8"),
    "no replies": ("vt", OUT, f"{HEADER}\n{EMPTY_ROW}\n", OTHER_COLUMNS),
    "answer above 999": ("aime", AIME, '{"problem": "x", "answer": 5000}\n', "expected 0 to 999"),
    "half a character": ("aime", AIME, HALF, "FILE, line 1: no JSON"),
    "empty file": ("aime", AIME, "", "FILE: empty; expected one JSON object a line"),
    "broken squad": ("qa", SQUAD, "{", "--squad FILE: no JSON (Expecting"),
    "question is a number": ("qa", SQUAD, PARAGRAPH % "[5]", "got another ('int' object has no"),
    "answer is a number": ("qa", SQUAD, PARAGRAPH % (QA % 5), "got another (5 where"),
    "answer is empty": ("qa", SQUAD, PARAGRAPH % (QA % '""'), "got another ('' where"),
    "half a letter": ("qa", SQUAD, PARAGRAPH % (QA % '"\\udc00"'), "--squad FILE: no JSON ("),
    "no squad": ("qa", SQUAD, "{}", "--squad FILE: expected SQuAD's format"),
    "empty squad": ("qa", SQUAD, '{"data": []}', "holds no answerable question"),
    "no longbench": ("longbench", ["--longbench", "FILE"], None, "no such folder"),
    "empty text": ("perplexity", ["--text", "FILE"], " \n", "--text FILE: empty"),
    "short text": ("perplexity", ["--text", "FILE"], "a b c", "expected 32 to 3"),
    "too long": ("vt", ["--lengths", "8192"], None, "--lengths 8192: the server's context is 4096"),
    "too short": ("vt", ["--lengths", "100"], None, "--lengths: expected at least 256 tokens"),
    "no samples": ("vt", ["--samples", "0"], None, "--samples: expected a number above 0, got 0"),
    "no folder": ("vt", ["--out", "/no/a.csv"], None, "--out /no/a.csv: expected a folder that"),
    "out is a folder": ("vt", ["--out", "/tmp"], None, "--out /tmp: expected a file's name"),
    "out is a device": ("vt", ["--out", "/dev/null"], None, "--out /dev/null: expected a file"),
    "report is no page": ("vt", ["--report", "a.png"], None, "expected a name that ends in .html"),
    "nothing to show": ("perplexity", ["--report", "a.html"], None, "--report: expected a task"),
    "foreign csv": ("vt", OUT, "a,b\n1,2", OTHER_COLUMNS),
    "csv of labels": ("vt", OUT, "label\nmine\nother\n", OTHER_COLUMNS),
    "one word": ("vt", OUT, "label", OTHER_COLUMNS),
    "torn header": ("vt", OUT, HEADER[:-5], OTHER_COLUMNS),
    "blank first line": ("vt", OUT, "\nmine\n", OTHER_COLUMNS),
    "short row": ("vt", OUT, f"{HEADER}\nmine\n", OTHER_COLUMNS),
    "long row": ("vt", OUT, f"{HEADER}\n{',' * len(COLUMNS)}\n", OTHER_COLUMNS),
    "no numbers": ("vt", OUT, f"{HEADER}\n{'x,' * (len(COLUMNS) - 1)}x\n", OTHER_COLUMNS),
    "no task": ("", [], None, "--tasks: expected some of ruler, "),
    "commas alone": (" , ", [], None, "--tasks: expected some of ruler, "),
    "timeout nan": ("vt", ["--timeout", "nan"], None, "--timeout: expected a number above 0"),
    "timeout inf": ("vt", ["--timeout", "inf"], None, "--timeout: expected a number above 0"),
    "temperature nan": ("vt", ["--temperature", "nan"], None, "--temperature: expected 0 or more"),
    "plot without a folder": ("vt", ["--plot", "/no/x.png"], None, "--plot /no/x.png: expected a"),
    "plot is a folder": ("vt", ["--plot", "."], None, "--plot .: expected a file's name"),
    "plot without a name": ("vt", ["--plot", ""], None, "--plot .: expected a file's name"),
    "plot of no kind": ("vt", ["--plot", "scores"], None, "ends in .png, .svg, .pdf, got none"),
    "plot over results": ("vt", ["--out", "x.png", "--plot", "./x.png"], None, "that of --out"),
    "nothing to draw": ("perplexity", ["--plot", "x.png"], None, "a score at a length, got none"),
    "late missing file": ("vt,aime", AIME, None, "FILE: cannot read"),
    "late missing squad": ("vt,qa", SQUAD, None, "--squad FILE: cannot read"),
    "late missing text": ("vt,perplexity", ["--text", "FILE"], None, "--text FILE: cannot read"),
    "late short length": ("vt", ["--lengths", "1024", "256"], None, "vt at 256 tokens: the short"),
    "late long prompt": ("vt,aime", AIME, LONG, "exceed the server's context of 4096"),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(
    case: tuple[str, list[str], str | None, str],
    kascade_eval: Eval,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, options, content, expected = case
    path = tmp_path / "given"
    if content is not None:
        path.write_text(content)
    with serving(lambda prompt: "", context=4096) as stub:
        given = [str(path) if option == "FILE" else option for option in options]
        assert kascade_eval(stub, task, *given) == 1
        assert stub.requests == []
    assert content is None or path.read_text() == content
    said = capsys.readouterr().err.strip()
    assert said.startswith("kascade: ") and "\n" not in said
    assert expected.replace("FILE", str(path)) in said


def test_no_server(kascade_eval: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:9", "http://"):
        assert kascade_eval(url, "vt") == 1
        assert "no OpenAI-compatible server answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "changed", "expected"),
    [
        ("passage_retrieval_en", {"answers": ["abc"]}, "answers: expected a paragraph's number"),
        ("trec", {"all_classes": 5}, "all_classes: expected a list of texts, got 5"),
        ("trec", {"all_classes": [1, 2]}, "all_classes: expected a list of texts, got [1, 2]"),
        ("trec", {"all_classes": None}, "all_classes: expected a list of texts, got None"),
        ("qasper", {"answers": []}, "answers: expected a list of texts, got []"),
        ("qasper", {"answers": [1]}, "answers: expected a list of texts, got [1]"),
        ("qasper", {"context": None}, "context: expected a text, got None"),
        ("qasper", {"input": {}}, "input: expected a text, got {}"),
    ],
)
def test_longbench_that_could_not_be_scored(
    dataset: str,
    changed: dict[str, Any],
    expected: str,
    data: Path,
    kascade_eval: Eval,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = data / f"{dataset}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, [rows[0], {**rows[1], **changed}])))
    with serving(lambda prompt: "") as stub:
        assert kascade_eval(stub, f"vt,longbench_{dataset}", "--longbench", str(data)) == 1
        assert stub.requests == []
    assert f"{path}: object 2: {expected}" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context(
    kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "aime.jsonl"
    path.write_text('{"problem": "%s", "answer": 1}' % ("word " * 600))
    with serving(lambda prompt: "", context=512) as stub:
        assert kascade_eval(stub, "aime", "--aime", str(path)) == 1
        assert stub.requests == []
    assert "exceed the server's context of 512" in capsys.readouterr().err


def test_another_tokenizer_than_the_servers(
    kascade_eval: Eval, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda prompt: "", extra_tokens=200) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 1
    assert "give the tokenizer of the served model" in capsys.readouterr().err


def test_a_server_that_names_no_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    from kascade_sglang import cli

    with serving(lambda prompt: "") as stub:
        command = ["eval", "--url", stub.url, "--tasks", "vt", "--out", "results.csv"]
        assert cli.main(command) == 1
    assert "does not say which it uses" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="a folder without a tokenizer"):
        Tokens.load(str(tmp_path))
