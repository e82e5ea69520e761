"""The guide to troubles quotes what the code says today."""

import re

import pytest

from tests.support.documents import ROOT

OTHERS = {"invalid choice: 'kascade'", "sglang.bench_one_batch", "bench_offline_throughput"}
OTHERS |= {"sglang serve --help", "/metrics"}
"""What SGLang says or names."""


def symptoms() -> list[str]:
    """Code in the first column of the tables."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    firsts = re.findall(r"^\| (.*?) \|", text, re.M)
    return [code for first in firsts for code in re.findall(r"`([^`]+)`", first)]


def said() -> str:
    """Every string of our sources: adjacent ones joined, ``#`` where one is filled in."""
    files = [
        path
        for folder in ("kascade_sglang", "kernels", "patches")
        for path in (ROOT / folder).rglob("*.py")
    ]
    text = "\n".join(path.read_text() for path in files)
    text = re.sub(r'"\n\s*f?"', "", text)
    return re.sub(r"\{[^{}\n]*\}", "#", text)


def pattern(symptom: str) -> str:
    """What a symptom leaves out, or names by a capital, may be anything on the line."""
    parts = re.split(r"(\.\.\.|\b[MN]\b)", symptom)
    return "".join(".*" if index % 2 else re.escape(part) for index, part in enumerate(parts))


@pytest.mark.parametrize("symptom", sorted(set(symptoms()) - OTHERS))
def test_symptoms_are_what_is_said(symptom: str) -> None:
    assert re.search(pattern(symptom), said()), symptom


def test_a_sentence_that_is_gone_is_found() -> None:
    assert len(symptoms()) > 15
    assert re.search(pattern("no Kascade plan for M: nobody knows"), said()) is None
