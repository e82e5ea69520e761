"""The files of ``--out``: what lacks only its end is kept, what is another's is left alone."""

import os
import stat
from pathlib import Path

import pytest

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.endpoint import Reply
from kascade_sglang.evaluation.results import COLUMNS, NUMBERS, Results, SavedReply
from kascade_sglang.files import why_unwritable, write_atomically

ROW = dict.fromkeys(COLUMNS, "") | dict.fromkeys(NUMBERS, "1") | {"date": "2026-11-28"}


def results_with_a_row(out: Path) -> Results:
    results = Results(out)
    results.add(ROW)
    results.save("a|b", "vt", ("x",), SavedReply(1.0, Reply("x", 1, 1, 0.1)))
    return results


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


@pytest.mark.parametrize(("lost", "kept"), [(1, 1), (2, 0), (9, 0)], ids=str)
def test_a_row_that_lacks_only_its_end_is_kept(tmp_path: Path, lost: int, kept: int) -> None:
    out = tmp_path / "r.csv"
    results_with_a_row(out)
    cut(out, lost)
    assert len(Results(out).rows()) == kept
    Results(out).add(ROW | {"label": "next"})
    assert len(Results(out).rows()) == kept + 1


@pytest.mark.parametrize(("lost", "kept"), [(1, 1), (2, 0)], ids=str)
def test_so_is_a_reply(tmp_path: Path, lost: int, kept: int) -> None:
    results_with_a_row(tmp_path / "r.csv")
    cut(tmp_path / "r.replies.jsonl", lost)
    assert len(Results(tmp_path / "r.csv").saved()) == kept


@pytest.mark.parametrize("text", ['{"of": "another tool"}', "notes", "notes\n", '{"key": 5}\n'])
def test_replies_of_another_are_refused_and_kept(tmp_path: Path, text: str) -> None:
    other = tmp_path / "r.replies.jsonl"
    other.write_text(text)
    with pytest.raises(EvaluationError, match=r"r\.replies\.jsonl"):
        Results(tmp_path / "r.csv").saved()
    assert other.read_text() == text


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing"])
def test_a_link_stays_a_link(tmp_path: Path, there: bool) -> None:
    link, target = tmp_path / "link.csv", tmp_path / "target.csv"
    link.symlink_to(target)
    if there:
        results_with_a_row(target)
    assert why_unwritable(link) is None
    Results(link)
    assert link.is_symlink() and target.exists() == there
    Results(link).add(ROW)
    assert link.is_symlink() and len(Results(target).rows()) == 1
    write_atomically(link, b"plan")
    assert link.is_symlink() and target.read_bytes() == b"plan"


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, Path("/dev/null")):
        assert "expected a file, got a device or pipe" in why_unwritable(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_names_leave_room_for_what_stands_beside_them(tmp_path: Path) -> None:
    assert why_unwritable(tmp_path / ("x" * 235)) is None
    assert "at most 235 bytes" in why_unwritable(tmp_path / ("x" * 236))
