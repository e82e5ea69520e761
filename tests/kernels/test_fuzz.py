"""The fuzzer runs, finds, and says how to run what it found again."""

import csv
import random
import sys
from pathlib import Path

import pytest

from tests import fuzz
from tests.support.shapes import needs_kernels


@needs_kernels
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_first_case_of_every_kind(kind: str) -> None:
    assert fuzz.wrong(kind, seed=0) is None


def test_a_find_is_counted_and_names_its_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sometimes(draw: random.Random) -> None:
        assert draw.random() < 0.5

    monkeypatch.setitem(fuzz.KINDS, "sometimes", sometimes)
    [row] = fuzz.fuzz(["sometimes"], range(7, 27), seconds=60)
    said = capsys.readouterr().out
    seeds = [seed for seed in range(7, 27) if f"--kinds sometimes --seed {seed} --cases 1" in said]
    assert row["cases"] == 20 and 0 < row["wrong"] == len(seeds) < 20
    assert all(fuzz.wrong("sometimes", seed) for seed in seeds)


@needs_kernels
def test_counts_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "fuzz.csv"
    arguments = ["fuzz", "--kinds", "ties", "--cases", "2", "--seed", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert fuzz.main() == 0
    [row] = csv.DictReader(out.read_text().splitlines())
    assert (row["kind"], row["cases"], row["wrong"], row["first_seed"]) == ("ties", "2", "0", "3")
    assert row["device"] and row["versions"] and row["date"]
