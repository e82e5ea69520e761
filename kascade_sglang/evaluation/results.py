"""Results on disk: one CSV row for every finished task, one JSON line for every reply.

Both files only grow, a whole line at a time, so that whatever ends a run, what was measured stays
and the same command goes on from there.
"""

import csv
import io
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.endpoint import Reply

COLUMNS = """label model task length n score low high metric prompt_tokens output_tokens
    prefill_attended decode_attended seconds prompt temperature seed samples data note version
    date""".split()
NUMBERS = ("n", "score", "low", "high")
MAYBE = ("prompt_tokens", "output_tokens", "seconds", "prefill_attended", "decode_attended")
"""Numbers that are not always known."""
KEY = ("label", "model", "task", "length", "prompt", "temperature", "samples")
"""Columns that say what was measured; ``samples`` is the fingerprint of all prompts."""


class LineFile:
    """A text file that grows by whole lines. Raises EvaluationError where it cannot.

    header: the first line; a file that starts otherwise is somebody else's and is refused. There
        is no file before there is a line.
    begin: how every line begins, where all begin alike.
    is_whole: whether a line is all there, asked of the last one where its end is missing.
    """

    def __init__(
        self, path: Path, is_whole: Callable[[str], bool], header: str = "", begin: str = ""
    ) -> None:
        # Of a link, what it points to.
        self.path, self._header = Path(os.path.realpath(path)), header
        self._begin, self._is_whole = begin, is_whole
        self._lock = threading.Lock()
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise EvaluationError(f"--out {path}: not a file")
            fresh = not os.path.exists(path)
            # Appending proves before anything is asked that the file can be written.
            with open(path, "ab"):
                pass
            if fresh:
                self.path.unlink()
            else:
                self._mend_torn_line()
        except OSError as error:
            raise EvaluationError(f"--out {path}: cannot write ({error.strerror})") from error

    def _mend_torn_line(self) -> None:
        """End a last line that lacks nothing but its end; cut off one that a crash tore."""
        content = self.path.read_bytes()
        if self._header and content and content.split(b"\n", 1)[0] != self._header.encode():
            raise self.foreign()
        whole = content.rfind(b"\n") + 1
        torn = content[whole:].decode(errors="replace")
        if not torn:
            return
        if not (torn.startswith(self._begin) or self._begin.startswith(torn)):
            raise self.foreign()
        if self._is_whole(torn):
            with open(self.path, "ab") as file:
                file.write(b"\n")
        else:
            os.truncate(self.path, whole)

    def foreign(self) -> EvaluationError:
        """What to raise where the file is not ours."""
        return EvaluationError(f"--out {self.path}: holds other columns; give a new file")

    def lines(self) -> list[str]:
        """Every line, without its end."""
        if not os.path.exists(self.path):
            return []
        try:
            # Not splitlines: cells may hold other ends of lines, such as U+2028.
            return self.path.read_bytes().decode().split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"--out {self.path}: cannot read ({error})") from error

    def append(self, line: str) -> None:
        """Add a line and see it on disk; where that fails, the file is as it was before."""
        with self._lock:
            self._append((line + "\n").encode())

    def _append(self, data: bytes) -> None:
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(file).st_size
                if not size and self._header:
                    data = f"{self._header}\n".encode() + data
                try:
                    while data:
                        data = data[os.write(file, data) :]
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, size)
                    raise
            finally:
                os.close(file)
        except OSError as error:
            raise EvaluationError(
                f"--out {self.path}: cannot write ({error.strerror}); what was written before is "
                "kept, and the same command goes on from there"
            ) from error


@dataclass(frozen=True)
class SavedReply:
    """A reply with its score: 0 to 1, or nats a token for perplexity."""

    score: float
    reply: Reply


class Results:
    """The CSV at ``out`` and the replies beside it; raises EvaluationError if they are not ours."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._csv = LineFile(out, _is_whole_row, header=",".join(COLUMNS))
        self._replies = LineFile(
            out.with_suffix(".replies.jsonl"), _is_whole_reply, begin='{"key": "'
        )
        self.rows()

    def rows(self) -> list[dict[str, str]]:
        """The rows so far; where a thing was measured twice, the newest."""
        rows = {}
        lines = self._csv.lines()
        try:
            for row in csv.DictReader(lines, strict=True):
                _check_row(row)
                rows[tuple(row[name] for name in KEY)] = row
        except (ValueError, csv.Error) as error:
            raise self._csv.foreign() from error
        return list(rows.values())

    def find(self, key: dict[str, str]) -> dict[str, str] | None:
        """The row that holds all of ``key``'s cells, if there is one."""
        return next((r for r in self.rows() if all(r[k] == v for k, v in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Write the row of a finished task."""
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, lineterminator="").writerow(row)
        self._csv.append(text.getvalue().replace("\n", " "))

    def saved(self) -> dict[str, SavedReply]:
        """{key: reply} of every reply so far."""
        found = {}
        for number, line in enumerate(self._replies.lines(), 1):
            try:
                entry = json.loads(line)
                found[entry["key"]] = SavedReply(float(entry["score"]), Reply(**entry["reply"]))
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(
                    f"{self._replies.path}, line {number}: not a reply of an earlier run; remove "
                    "the file to start afresh"
                ) from error
        return found

    def save(self, key: str, task: str, answers: tuple[str, ...], saved: SavedReply) -> None:
        """Write one reply."""
        entry = {"key": key, "task": task, "answers": answers, "score": saved.score}
        self._replies.append(json.dumps({**entry, "reply": vars(saved.reply)}, ensure_ascii=True))


def _is_whole_row(line: str) -> bool:
    """Whether a line has all cells, the last of them, a date, to its last digit."""
    cells = next(csv.reader([line]), [])
    return len(cells) == len(COLUMNS) and bool(re.fullmatch(r"\d{4}-\d\d-\d\d", cells[-1]))


def _is_whole_reply(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _check_row(row: dict[Any, Any]) -> None:
    """Raise ValueError for a row that could be neither shown nor drawn."""
    if None in row or None in row.values():
        raise ValueError("expected a cell for every column")
    int(row["length"] or 0)
    if int(row["n"]) < 1:
        raise ValueError("expected replies")
    for name in NUMBERS:
        float(row[name])
    for name in MAYBE:
        float(row[name] or 0)
