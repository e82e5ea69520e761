"""``kascade eval`` against a stub server: a perfect model, a broken one, and everything amiss."""

import csv
import errno
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kascade_sglang.evaluation import command, harness
from kascade_sglang.evaluation.endpoint import Endpoint
from kascade_sglang.evaluation.harness import NOT_SPARSE, RESUMED, EvalSettings
from kascade_sglang.evaluation.registry import groups, pick
from kascade_sglang.evaluation.results import COLUMNS, Results
from kascade_sglang.evaluation.samples import Order, Sample, Task
from kascade_sglang.evaluation.tokens import Tokens
from tests.support.stub import WordTokenizer, perfect, serving

Eval = Callable[..., int]
CHINESE = ("multifieldqa_zh", "dureader", "vcsum")
SPARSE = {("prefill", "attended"): 20, ("prefill", "dense"): 100}
SPARSE |= {("decode", "attended"): 1, ("decode", "dense"): 10}


def samples_of(names: list[str], length: int = 1024, **files: Path | None) -> list[Sample]:
    options = {"squad": None, "aime": None, "longbench": None, "text": None, **files}
    order = {"count": 3, "seed": 0, "tokens": Tokens(WordTokenizer())}
    return [
        sample
        for task in pick(names, groups(**options))
        for sample in task.make(Order(length if task.by_length else None, **order))
    ]


def right_reply(sample: Sample) -> str:
    if "\\boxed" in sample.prompt:
        return f"It is \\boxed{{{sample.answers[0]}}}."
    return ", ".join(sample.answers)


def rows(tmp_path: Path) -> list[dict[str, str]]:
    if not (tmp_path / "results.csv").exists():
        return []
    with open(tmp_path / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def names_of(data: Path) -> list[str]:
    english = [f"longbench_{p.stem}" for p in data.glob("*.jsonl") if p.stem not in CHINESE]
    english.remove("longbench_aime")
    return ["ruler", "facts", "aime", *sorted(english)]


@pytest.mark.parametrize("prompt", ["chat_prefix", "chat", "completion"])
def test_a_perfect_model_scores_100(
    prompt: str, kascade_eval: Eval, data: Path, tmp_path: Path
) -> None:
    names = names_of(data) if prompt == "chat_prefix" else ["niah_single_1", "vt", "aime"]
    files = {"aime": data / "aime.jsonl", "longbench": data}
    model = perfect(samples_of(names, **files), right_reply)
    with serving(model, growth=SPARSE) as stub:
        options = ["--aime", str(files["aime"]), "--longbench", str(data), "--lengths", "1024"]
        assert kascade_eval(stub, ",".join(names), *options, "--prompt", prompt) == 0
    found = rows(tmp_path)
    expected = pick(names, groups(None, files["aime"], data, None))
    assert [row["task"] for row in found] == [task.name for task in expected]
    assert len(found) == (36 if prompt == "chat_prefix" else 3)
    assert {row["score"] for row in found} == {"100.00"}
    assert {row["prefill_attended"] for row in found} == {"0.2000"}
    assert {row["decode_attended"] for row in found} == {"0.1000"}
    assert {row["note"] for row in found} == {""}


@pytest.mark.parametrize("garbage", ["", "@@ ## !!"])
def test_a_broken_model_scores_0(
    garbage: str, kascade_eval: Eval, data: Path, tmp_path: Path
) -> None:
    names = names_of(data)
    with serving(lambda prompt: garbage) as stub:
        options = ["--aime", str(data / "aime.jsonl"), "--longbench", str(data)]
        assert kascade_eval(stub, ",".join(names), *options, "--lengths", "1024") == 0
    assert {row["score"] for row in rows(tmp_path)} == {"0.00"}
    assert {row["low"] for row in rows(tmp_path)} == {"0.00"}


def test_what_is_sent(kascade_eval: Eval) -> None:
    with serving(lambda prompt: "") as stub:
        kascade_eval(stub, "niah_single_1", "--lengths", "1024", "--concurrency", "1")
        kascade_eval(stub, "niah_single_1", "--lengths", "1024", "--prompt", "chat")
        body, chat = stub.requests[0], stub.requests[3]
    assert body["continue_final_message"] is True
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"]
    assert body["messages"][1]["content"].endswith("mentioned in the provided text is")
    assert (body["max_tokens"], body["temperature"]) == (128, 0)
    assert [message["role"] for message in chat["messages"]] == ["user"]
    assert chat["messages"][0]["content"].endswith("mentioned in the provided text is")


def test_perplexity_is_that_of_the_log_probabilities(
    kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda prompt: "", loss=1.5) as stub:
        assert kascade_eval(stub, "perplexity", "--lengths", "1024") == 0
        assert [len(body["input_ids"]) for body in stub.requests] == [1023] * 3
    assert [row["score"] for row in rows(tmp_path)] == ["4.4817"]  # e ** 1.5
    with serving(lambda prompt: "", sglang=False) as stub:
        assert kascade_eval(stub, "perplexity", "--lengths", "1024", "--label", "other") == 1
    assert "has no /generate" in capsys.readouterr().err


def test_a_task_that_is_not_sparse_is_warned_of(
    kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = {("prefill", kind): 100 for kind in ("attended", "dense")}
    with serving(lambda prompt: "no", growth=dense) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
    assert rows(tmp_path)[0]["note"] == NOT_SPARSE
    assert "warning: vt 1024: not sparse" in capsys.readouterr().err


def test_a_finished_task_is_not_asked_again(kascade_eval: Eval, tmp_path: Path) -> None:
    with serving(lambda prompt: "") as stub:
        kascade_eval(stub, "vt", "--lengths", "1024")
        kascade_eval(stub, "vt,fwe", "--lengths", "1024")
        assert len(stub.requests) == 6
        kascade_eval(stub, "vt", "--lengths", "1024", "--seed", "1")
        kascade_eval(stub, "vt", "--lengths", "1024", "--label", "dense")
        assert len(stub.requests) == 12
    assert [row["task"] for row in rows(tmp_path)] == ["vt", "fwe", "vt", "vt"]


def test_replies_before_a_failure_are_not_asked_again(
    kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lengths", "1024", "--concurrency", "1"]
    with serving(lambda prompt: "", fail_after=2) as stub:
        assert kascade_eval(stub, "vt", *options) == 1
        assert "refused a request (status 400): " in capsys.readouterr().err
        assert rows(tmp_path) == []
        stub.fail_after = None
        assert kascade_eval(stub, "vt", *options) == 0
        assert len(stub.requests) == 3
    assert rows(tmp_path)[0]["n"] == "3"


def test_a_row_made_of_saved_replies_says_so(kascade_eval: Eval, tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    with serving(lambda prompt: "no", growth=SPARSE) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
        (whole,) = rows(tmp_path)
        out.write_text(out.read_text().splitlines()[0] + "\n")
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
        assert len(stub.requests) == 3
    (row,) = rows(tmp_path)
    uncounted = {"prefill_attended": "", "decode_attended": "", "note": RESUMED}
    assert row == {**whole, **uncounted}


@pytest.mark.parametrize("line", ["oops", "[]", '{"key": "a", "score": "x", "reply": {}}'])
def test_replies_of_something_else_are_refused(
    line: str, kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.replies.jsonl").write_text(line + "\n")
    with serving(lambda prompt: "") as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 1
        assert stub.requests == []
    assert "line 1: not a reply of an earlier run" in capsys.readouterr().err


def test_a_label_may_hold_any_character(kascade_eval: Eval, tmp_path: Path) -> None:
    label = "a\u2028b\x0b,c"
    with serving(lambda prompt: "") as stub:
        for _ in range(2):
            assert kascade_eval(stub, "vt", "--lengths", "1024", "--label", label) == 0
        assert len(stub.requests) == 3
    assert [row["label"] for row in rows(tmp_path)] == [label]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_the_time_left(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    on_reply = command._Progress()
    for task, length in (("vt", 1024), ("perplexity", None)):
        for done in (1, 2, 3):
            on_reply(task, length, done, 3)
            if terminal and done == 1:
                time.sleep(0.12)  # tqdm draws ten times a second
    said = capsys.readouterr().err
    if terminal:
        assert "vt 1024:" in said and "3/3" in said and re.search(r"\d\d:\d\d<\d\d:\d\d", said)
    else:
        assert said.splitlines() == ["vt 1024: 3 of 3", "perplexity: 3 of 3"]


def test_ctrl_c_keeps_what_there_is_and_says_how_to_go_on(
    kascade_eval: Eval,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(task: str, length: int | None, done: int, count: int) -> None:
        if task == "fwe" and done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "_Progress", lambda: interrupt)
    with serving(lambda prompt: "") as stub:
        assert kascade_eval(stub, "vt,fwe", "--lengths", "1024", "--concurrency", "1") == 130
        said = capsys.readouterr().err
        assert "keeps 1 rows" in said and "run the same command again" in said
        monkeypatch.setattr(command, "_Progress", lambda: lambda *progress: None)
        assert kascade_eval(stub, "vt,fwe", "--lengths", "1024", "--concurrency", "1") == 0
        assert len(stub.requests) == 6
    assert [row["task"] for row in rows(tmp_path)] == ["vt", "fwe"]


def test_a_full_disk_loses_nothing(
    kascade_eval: Eval,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, room = os.write, 2500

    def until_full(file: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(file, data[:room])
        room -= taken
        return taken

    with serving(lambda prompt: "x" * 300) as stub:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", until_full)
            assert kascade_eval(stub, "vt,fwe,cwe", "--lengths", "1024") == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("kascade: --out ") and "No space left on device" in said
        replies = tmp_path / "results.replies.jsonl"
        kept = replies.read_text()
        assert kept.endswith("\n") and 0 < kept.count("\n") < 9
        assert kascade_eval(stub, "vt,fwe,cwe", "--lengths", "1024") == 0
    assert replies.read_text().startswith(kept)
    keys = [json.loads(line)["key"] for line in replies.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 9
    assert [row["task"] for row in rows(tmp_path)] == ["vt", "fwe", "cwe"]


def test_a_torn_line_is_dropped(kascade_eval: Eval, tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    out.write_text(",".join(COLUMNS) + "\nkascade,stub,vt,10")
    with serving(lambda prompt: "") as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
    assert [row["length"] for row in rows(tmp_path)] == ["1024"]


def test_table_and_plot(
    kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "scores.png"
    with serving(lambda prompt: "", growth=SPARSE) as stub:
        options = ["--lengths", "1024", "2048", "--plot", str(picture)]
        assert kascade_eval(stub, "vt,fwe", *options) == 0
    assert picture.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "20.0%" in shown and "fwe" in shown and "0.00-56.15" in shown


def test_an_interrupt_ends_the_making_of_samples(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made in a thread, for hours where prompts are long, and it must not outlive it."""
    begun, sample = threading.Event(), Sample("x", (), 1, 1, lambda reply: 1.0)

    def endless(order: Order) -> list[Sample]:
        if order.count == 1:  # The one that is tried first.
            return [sample]
        begun.set()
        return [sample for _ in order.numbers(10**12) if time.sleep(0.001)]

    def interrupted(*futures: object) -> list[Sample]:
        assert begun.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "_next", interrupted)
    endpoint = Endpoint("http://127.0.0.1:9", "m", None, None, "server")
    settings = EvalSettings((1024,), 3, 0, "chat", 1, 0.0, 1.0, None, "label")
    run = harness.Harness(endpoint, tokens, settings, Results(tmp_path / "r.csv")).run
    with pytest.raises(KeyboardInterrupt):
        run([Task("endless", endless, True, "m")])
