"""Reading texts and JSON lines; every refusal names the file and the line."""

import json
from pathlib import Path
from typing import Any

from kascade_sglang.errors import EvaluationError
from kascade_sglang.text import reading


def read_text(path: Path, where: str) -> str:
    """Read a UTF-8 file; raises EvaluationError, calling it ``where``, if that cannot be."""
    try:
        return reading.read_text(path)
    except reading.UnreadableError as error:
        raise EvaluationError(f"{where}: cannot read ({error})") from error


def read_jsonl(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read one object a line, each with at least ``fields``; blank lines are left out.

    Raises EvaluationError where the file is missing, empty or malformed.
    """
    lines = read_text(path, str(path)).split("\n")
    rows = [
        _parse(path, number, line, fields) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not rows:
        raise EvaluationError(f"{path}: empty; expected one JSON object a line")
    return rows


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; raises EvaluationError, calling it ``where``, if that cannot be."""
    try:
        value = json.loads(text)
        # Half a surrogate pair is JSON, but neither tokenizers nor servers take it.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: no JSON ({error})") from error
    return value


def _parse(path: Path, number: int, line: str, fields: tuple[str, ...]) -> dict[str, Any]:
    row = parse_json(line, f"{path}, line {number}")
    if not isinstance(row, dict):
        raise EvaluationError(f"{path}, line {number}: expected an object, got {line[:40]!r}")
    missing = [field for field in fields if field not in row]
    if missing:
        raise EvaluationError(f"{path}, line {number}: no field {missing[0]!r}")
    return row
