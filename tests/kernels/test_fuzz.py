"""The fuzzer runs, finds, and says how to run what it found again."""

import random

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
