"""Records of prompt files: JSON of several layouts, each turned into a text or a chat."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kascade_sglang.errors import CalibrationError

LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xml", ".yaml", ".yml")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
"""What ShareGPT calls who speaks, in OpenAI's words."""
EXPECTED = 'expected an object with "text", "prompt", "messages" or "conversations"'


def records(path: Path, text: str) -> Iterator[tuple[str, Any]] | None:
    """Yield the file's records, each with its place; None where the file is plain text.

    Raises CalibrationError for JSON that is broken or does not say that it is, and for tables.
    """
    suffix = next((each for each in reversed(path.suffixes) if each != ".gz"), "").lower()
    if suffix in LINES:
        return _lines(path, text)
    if suffix == ".json":
        return _whole(path, text)
    if suffix in TABLES:
        raise CalibrationError(
            f"{path}: expected text, .jsonl or .json, got {suffix}; convert it, or name the data "
            "set with --dataset"
        )
    if _holds_json(text):
        raise CalibrationError(
            f"{path}: expected text, got JSON; give the file a name that ends in .jsonl, or .json "
            "where it is one array"
        )
    return None


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines: JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _whole(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of one array, one object, or of lines that were named .json."""
    first, _, more = text.strip().partition("\n")
    if more and _is_json(first):
        yield from _lines(path, text)
        return
    found = _parse(text, str(path))
    for number, record in enumerate([found] if _is_one_record(found) else found, 1):
        yield f"{path}, record {number}", record


def _is_one_record(found: Any) -> bool:
    """Whether JSON is one record, such as an array of turns, not an array of records."""
    if not isinstance(found, list):
        return True
    turns = [isinstance(one, dict) and bool({"role", "from"} & one.keys()) for one in found]
    return bool(turns) and all(turns)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: not JSON ({error})") from error


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _holds_json(text: str) -> bool:
    """Whether a text is an object or array of JSON, or begins with a line that is one."""
    text = text.strip()
    return text[:1] in ("{", "[") and (_is_json(text.partition("\n")[0]) or _is_json(text))


def text_or_chat(record: Any) -> str | list[dict[str, Any]]:
    """Return a record's text, or its turns with ``role`` and ``content``.

    Raises CalibrationError for a record of any other layout.
    """
    if isinstance(record, list) and record and all(isinstance(turn, dict) for turn in record):
        return _chat(record, "a list")
    if not isinstance(record, dict):
        raise CalibrationError(EXPECTED)
    # A chat first: some data sets name its first message or its id beside it.
    chats = [key for key in ("messages", "conversations") if isinstance(record.get(key), list)]
    if not any(record[key] for key in chats):
        for key in ("text", "prompt"):
            if isinstance(record.get(key), str):
                return record[key]
    for key in (*chats, "prompt"):
        if isinstance(record.get(key), list):
            turns = _chat(record[key], f'"{key}"')
            system = record.get("system")
            if key == "conversations" and system and isinstance(system, str):
                turns.insert(0, {"role": "system", "content": system})
            return turns
    raise CalibrationError(f"{EXPECTED}, got {', '.join(map(str, list(record)[:8])) or 'none'}")


def _chat(turns: list[Any], where: str) -> list[dict[str, Any]]:
    if not turns:
        raise CalibrationError(f"{where}: expected turns of a chat, got none")
    return [_turn(turn, where) for turn in turns]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """Return a turn in OpenAI's layout, its content one text."""
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        role = ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise CalibrationError(
                f'{where}: expected turns with a "value" from {", ".join(ROLES)}, got one from '
                f"{turn['from']!r}"
            )
        return {"role": role, "content": turn["value"]}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise CalibrationError(f'{where}: expected objects with "role" and "content"')
    content = turn.get("content")
    if isinstance(content, list):
        return {**turn, "content": "".join(_part(part, where) for part in content)}
    # A turn that calls a tool may say nothing.
    if not isinstance(content, str) and (content is not None or not turn.get("tool_calls")):
        raise CalibrationError(f'{where}: expected "content" of text, got {type(content).__name__}')
    return turn


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise CalibrationError(f'{where}: expected parts of text in "content", got {kind}')
    return text
