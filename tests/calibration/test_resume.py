"""Stopped runs: what is kept, what the user reads, and the same bits after going on."""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kascade_sglang import files
from kascade_sglang.calibration import run
from kascade_sglang.cli import main

PROMPTS = 4


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("prompts") / "dev.jsonl"
    words = torch.randint(0, 60, (PROMPTS, 200), generator=generator).tolist()
    path.write_text(
        "\n".join(json.dumps({"text": " ".join(f"w{w}" for w in row)}) for row in words)
    )
    return path


@pytest.fixture
def calibrate(model_folder: Path, prompts: Path) -> Callable[..., int]:
    def call(out: Path, *more: str) -> int:
        return main(
            ["calibrate", "--model", str(model_folder), "--prompts", str(prompts), "--out",
             str(out), "--anchors", "2", "--min-k", "64", "--device", "cpu", *more]
        )  # fmt: skip

    return call


def failing_at(call: int, error: BaseException) -> Callable[..., Any]:
    """measure_prompt, except that the given call raises."""
    real, calls = run.measure_prompt, iter(range(1, 100))

    def measure(*args: Any) -> Any:
        if next(calls) == call:
            raise error
        return real(*args)

    return measure


def test_interrupted_run_goes_on_to_the_same_bits(
    calibrate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    assert calibrate(whole) == 0
    real = run.measure_prompt
    monkeypatch.setattr(run, "measure_prompt", failing_at(3, KeyboardInterrupt()))
    assert calibrate(resumed) == 130
    parts = tmp_path / "resumed.json.parts"
    assert f"stopped: 2 of 4 prompts are measured and kept in {parts}; give the same" in caplog.text
    assert not resumed.exists() and len(list(parts.glob("prompt-*.npz"))) == 2

    measured = []
    monkeypatch.setattr(run, "measure_prompt", lambda *args: (measured.append(1), real(*args))[1])
    assert calibrate(resumed) == 0
    assert "resuming: 2 of 4 prompts are measured already" in caplog.text
    assert len(measured) == 2 and resumed.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_a_measured_prompt_is_not_lost_to_a_later_failure(
    calibrate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "plan.json"
    failure = torch.OutOfMemoryError("no")
    monkeypatch.setattr(run, "measure_prompt", failing_at(2, failure))
    assert calibrate(out) == 1
    assert "cpu: out of memory on a prompt of up to 201 tokens; lower" in capsys.readouterr().err
    assert [path.name for path in sorted((tmp_path / "plan.json.parts").iterdir())] == [
        "prompt-00000.npz",
        "settings.json",
    ]


@pytest.mark.parametrize("write", ["first measurements", "plan"])
def test_full_disk_keeps_what_is_measured(
    calibrate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: str,
) -> None:
    out = tmp_path / "plan.json"
    out.write_text("the old plan")
    writes, fsync = iter(range(100)), os.fsync
    # Each prompt writes settings and measurements; the plan comes last.
    full_at = 3 if write == "first measurements" else 2 * PROMPTS

    def full_disk(descriptor: int) -> None:
        if next(writes) >= full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full_disk)
    assert calibrate(out) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write (No space left on device)" in last and "same command to go on" in last
    assert out.read_text() == "the old plan"
    kept = sorted(path.name for path in (tmp_path / "plan.json.parts").iterdir())
    assert len(kept) - 1 == (1 if write == "first measurements" else PROMPTS)
    assert not any(name.endswith(".part") for name in kept)
    monkeypatch.undo()
    assert calibrate(out) == 0
    assert json.loads(out.read_text())["provenance"]["prompts"] == PROMPTS


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--seed", "1"], "unfinished run with seed 0, now 1; give the options of that run"),
        (["--tiles", "2"], "with tiles 64, now 2"),
        (["--limit", "3"], "with limit None, now 3"),
        (["--max-tokens", "150"], "with max_tokens None, now 150"),
        (["--dtype", "bfloat16"], "with dtype 'auto', now 'bfloat16'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_settings_do_not_mix(
    calibrate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    sentence: str,
) -> None:
    out = tmp_path / "plan.json"
    monkeypatch.setattr(run, "measure_prompt", failing_at(2, KeyboardInterrupt()))
    assert calibrate(out) == 130
    monkeypatch.undo()
    assert calibrate(out, *more) == 1
    assert sentence in capsys.readouterr().err
    # What is chosen after measuring may change.
    assert calibrate(out, "--anchors", "3", "--heads", "pooled") == 0


def test_stopped_before_the_first_prompt_leaves_nothing(
    calibrate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure_prompt", failing_at(1, KeyboardInterrupt()))
    assert calibrate(tmp_path / "plan.json") == 130
    assert list(tmp_path.iterdir()) == []


def test_other_files_in_the_folder_stay(calibrate: Callable[..., int], tmp_path: Path) -> None:
    parts = tmp_path / "plan.json.parts"
    parts.mkdir()
    (parts / "notes.txt").write_text("mine")
    assert calibrate(tmp_path / "plan.json") == 0
    assert [path.name for path in parts.iterdir()] == ["notes.txt"]


def test_a_file_in_the_folders_place(
    calibrate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "plan.json.parts"
    parts.write_text("mine")
    assert calibrate(tmp_path / "plan.json") == 1
    assert f"{parts}: expected a folder of measurements" in capsys.readouterr().err
    assert parts.read_text() == "mine"


def saved(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    content = io.BytesIO()
    save(content, *arrays, **named)
    return content.getvalue()


OURS = {
    "similarity": np.ones((4, 4, 2, 2)),
    "pooled": np.ones((4, 4)),
    "mass": np.ones((3, 4, 2)),
    "importance": np.ones(4),
    "tokens": 201,
    "tiles": 4,
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4 cut",
        b"junk",
        saved(np.save, np.ones(4)),
        saved(np.savez, **{**OURS, "pooled": np.ones((3, 3))}),
        saved(np.savez, **{**OURS, "importance": np.array(list("abcd"))}),
        saved(np.savez, **{**OURS, "pooled": np.full((4, 4), np.nan)}),
        saved(np.savez, **{**OURS, "tokens": [1, 2]}),
    ],
    ids=["empty", "cut", "junk", "npy", "shape", "text", "nan", "count"],
)
def test_damaged_measurements(
    calibrate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    out = tmp_path / "plan.json"
    monkeypatch.setattr(run, "measure_prompt", failing_at(2, KeyboardInterrupt()))
    assert calibrate(out) == 130
    monkeypatch.undo()
    path = tmp_path / "plan.json.parts" / "prompt-00000.npz"
    path.write_bytes(content)
    assert calibrate(out) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{path}: not a file of measurements" in last and "delete it" in last
    path.unlink()
    assert calibrate(out) == 0
