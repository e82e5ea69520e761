"""Prompt files as other tools write them: read as they are meant, or refused in one sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kascade_sglang.calibration.prompts import Prompt, read_prompts
from kascade_sglang.calibration.records import text_or_chat
from kascade_sglang.errors import CalibrationError

TEXTS = [{"text": "w0 w1"}, {"prompt": "w2"}]
READ = [Prompt([0, 4, 5]), Prompt([0, 6])]
LINES = "".join(json.dumps(record) + "\n" for record in TEXTS)
ARRAY = json.dumps(TEXTS, indent=1)
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
SHARED = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", LINES),
        ("p.JSONL", LINES),
        ("p.ndjson", LINES),
        ("p.json", ARRAY),
        ("p.json", json.dumps(TEXTS)),
        ("p.json", LINES),
        ("p.jsonl", "\ufeff" + LINES),
        ("p.json", "\ufeff" + ARRAY),
        ("p.jsonl", LINES.replace("\n", "\r\n")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_layouts_of_files(
    name: str, content: str, packed: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert read_prompts(path, tokenizer, context=8) == READ


def test_packed_text_is_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "book.txt.gz"
    path.write_bytes(gzip.compress(b"w0 w1"))
    assert read_prompts(path, tokenizer, context=8) == [Prompt([0, 4, 5])]


def test_one_object_is_one_prompt(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"text": "w0 w1", "id": 3}, indent=1))
    assert read_prompts(path, tokenizer, context=8) == READ[:1]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": CHAT},
        {"conversations": SHARED, "id": "x"},
        {"prompt": CHAT},
        CHAT,
        SHARED,
        {"messages": [{**CHAT[0], "content": [{"type": "text", "text": "w1"}]}, CHAT[1]]},
        {"messages": [{**CHAT[0], "content": ["w", "1"]}, CHAT[1]]},
        {"messages": [{**CHAT[0], "content": [{"text": "w"}, {"text": "1"}]}, CHAT[1]]},
    ],
)
def test_layouts_of_chats(record: Any) -> None:
    assert text_or_chat(record) == CHAT


def test_a_system_prompt_beside_shared_turns() -> None:
    record = {"conversations": SHARED, "system": "w9"}
    assert text_or_chat(record) == [{"role": "system", "content": "w9"}, *CHAT]
    assert text_or_chat({**record, "system": ""}) == CHAT


def test_calls_of_tools_may_say_nothing() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert text_or_chat([CHAT[0], call]) == [CHAT[0], call]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({}, 'conversations", got none'),
        ({"instruction": "w0", "output": "w1"}, "got instruction, output"),
        ({"messages": []}, '"messages": expected turns of a chat, got none'),
        ({"messages": "w0"}, "got messages"),
        ({"conversations": [{"from": "robot", "value": "w0"}]}, "got one from 'robot'"),
        ({"conversations": [{"from": ["gpt"], "value": "w0"}]}, r"got one from \['gpt'\]"),
        ({"conversations": [{"from": "gpt", "value": None}]}, 'with a "value"'),
        ({"messages": [{"role": 3, "content": "w0"}]}, 'with "role" and "content"'),
        ({"messages": [{"role": "user", "content": None}]}, "got NoneType"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "got dict"),
        ({"messages": [{"role": "user"}]}, "got NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}]},
            'parts of text in "content", got image_url',
        ),
        ({"messages": [{"role": "user", "content": [3]}]}, "got int"),
        (["w0"], "expected an object"),
        (None, "expected an object"),
        (3, "expected an object"),
    ],
)
def test_other_records_are_refused(record: Any, sentence: str) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        text_or_chat(record)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", LINES, "expected text, got JSON"),
        ("p.md", ARRAY, "expected text, got JSON"),
        ("prompts", json.dumps(TEXTS), "expected text, got JSON"),
        ("p.txt.gz", LINES, "expected text, got JSON"),
        ("p.csv", "text\nw0\n", "expected text, .jsonl or .json, got .csv"),
        ("p.json", "[]", "no prompts in it"),
        ("p.json", "[[]]", ", record 1: expected an object"),
        ("p.json", '[{"text": "w0"}', "p.json: not JSON"),
        ("p.json", '{"data": [{"text": "w0"}]}', "got data"),
        ("p.json", "w0 w1", "p.json: not JSON"),
        ("p.json", '{"text": "w0"}\n{"text"\n', ":2: not JSON"),
        ("p.jsonl", "\ufeff", "the file is empty"),
    ],
)
def test_other_files_are_refused(
    name: str, content: str, sentence: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / name
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(CalibrationError, match=sentence):
        read_prompts(path, tokenizer, context=8)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl.gz", "p.json"])
def test_damaged_archives_folders_and_devices_are_refused(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / name
    for damaged in (gzip.compress(LINES.encode())[:-9], b"\x1f\x8b\x08broken"):
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match="cannot read the prompts"):
            read_prompts(path, tokenizer, context=8)
    for other in (tmp_path, Path("/dev/zero")):
        with pytest.raises(CalibrationError, match="expected a file, got a folder or device"):
            read_prompts(other, tokenizer, context=8)


def test_prose_in_brackets_is_prose(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("[w0 w1] w2\n{w3}")
    assert len(read_prompts(path, tokenizer, context=8)) == 1
