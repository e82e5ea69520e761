"""The fuzzer runs, finds, says how to run what it found again, and compiles few kernels."""

import csv
import random
import sys
from pathlib import Path

import pytest

# First, because it replaces functions of Triton that kernels might call.
import sglang.srt.utils.common  # noqa: F401
import torch

from kascade_kernels import tuning
from tests.fuzz import __main__ as fuzz
from tests.fuzz import cases
from tests.support.capture import launched_variants
from tests.support.interpreter import tune
from tests.support.shapes import INTERPRETED, needs_kernels


@needs_kernels
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_first_launch_of_every_kind(kind: str) -> None:
    count, error = fuzz.run(kind, seed=0)
    assert error is None and count > 1


@pytest.fixture
def sometimes(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(draw: random.Random) -> int:
        assert draw.random() < 0.5
        return 1

    monkeypatch.setitem(fuzz.KINDS, "sometimes", kind)


def test_a_find_is_counted_and_names_its_seed(
    sometimes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    [row] = fuzz.fuzz(["sometimes"], first=7, cases=20, seconds=60)
    said = capsys.readouterr().out
    seeds = [seed for seed in range(7, 27) if f"--kinds sometimes --seed {seed} --cases 1" in said]
    assert row["cases"] == 20 and 0 < row["wrong"] == len(seeds) < 20
    assert all(fuzz.run("sometimes", seed)[1] for seed in seeds)


@needs_kernels
@pytest.mark.parametrize("logits", cases.WEIGHTS)
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_every_kind_of_logits(kind: str, logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "WEIGHTS", {logits: 1})
    for seed in range(2):
        assert fuzz.run(kind, seed)[1] is None


@needs_kernels
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection by other codes than those of the scores, and one value of the output."""
    from tests.fuzz import decode, prefill

    def off(attend):
        def wrong(*args: object, **options: object) -> torch.Tensor:
            out = attend(*args, **options)
            out[-1, -1, -1] += 1
            return out

        return wrong

    for module, name in ((prefill, "tile_attention"), (decode, "decode_attention")):
        monkeypatch.setattr(module, name, off(getattr(module, name)))
    monkeypatch.setattr(cases, "WEIGHTS", {"usual": 1})
    for kind in ("prefill", "decode"):
        said = fuzz.run(kind, seed=0)[1]
        for part in ("head 0: attention", "eager attention is by", "keys, values to", "float16"):
            assert part in said


@needs_kernels
def test_lists_may_be_longer_than_those_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where programs of the budget's length would not reach their end."""
    tune(monkeypatch, "attend", most=2)
    assert fuzz.run("decode", seed=124)[1] is None


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_few_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a second or so: variants, not cases, would be what a run is spent on."""
    monkeypatch.setattr(tuning, "capability_of", lambda device: 9)
    with launched_variants(90) as variants:
        for seed in range(60):
            for kind in ("prefill", "decode", "ties"):
                fuzz.run(kind, seed)
    assert 20 < len(variants) <= 80


@needs_kernels
def test_counts_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "fuzz.csv"
    arguments = ["fuzz", "--kinds", "ties", "--cases", "2", "--seed", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert fuzz.main() == 0
    [row] = csv.DictReader(out.read_text().splitlines())
    assert (row["kind"], row["wrong"], row["first_seed"]) == ("ties", "0", "3")
    assert int(row["cases"]) == cases.REQUESTS
    assert row["device"] and row["versions"] and row["date"]
