"""The commands a user types: ``sglang serve``, help and refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.servers.process import Server
from tests.support.models import LLAMA
from tests.support.requests import (
    assert_equals,
    generate,
    prompt_ids,
    reference,
    shipped_plan,
    tokens_and_logprobs,
)
from tests.support.servers import served

pytestmark = pytest.mark.e2e

LAUNCH = [sys.executable, "-m", "sglang.launch_server"]
SGLANG = [str(Path(sys.executable).with_name("sglang")), "serve"]
KASCADE = ["--attention-backend", "kascade"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


@served(
    *("--kascade-heads", "pooled", "--page-size", "1"), command=SGLANG, KASCADE_TOPK_RATIO="0.2"
)
def test_sglang_serve_pooled_at_page_size_one(server: Server) -> None:
    plan = shipped_plan()
    budget = dataclasses.replace(plan.budget, ratio=0.2)
    pooled = dataclasses.replace(plan, heads="pooled", budget=budget)
    ids = prompt_ids(30, 1400)
    replies = [generate(server, ids, 10) for _ in range(2)]
    assert replies[1]["meta_info"]["cached_tokens"] == len(ids) - 1
    for reply in replies:
        assert_equals(tokens_and_logprobs(reply), reference(pooled, ids, 10))


def test_help_shows_the_flags() -> None:
    result = run([*LAUNCH, "--help"])
    assert result.returncode == 0
    for flag in ("plan", "topk-ratio", "min-k", "heads"):
        assert f"--kascade-{flag}" in result.stdout


def test_refusal_is_one_sentence_and_status_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    result = run([*SGLANG, "--model-path", str(tmp_path), *KASCADE])
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"kascade: no Kascade plan for {tmp_path}: no kascade_plan.json beside")
    assert "make one with `kascade calibrate" in last


def test_doctor_proves_in_a_fresh_process_that_hooks_run() -> None:
    doctor = [sys.executable, "-m", "kascade_sglang.cli", "doctor"]
    well = run([*doctor, "--model", str(MODEL), "--", "--page-size", "32"])
    assert well.returncode == 0, well.stdout + well.stderr
    assert "ready to serve" in well.stdout and "live on SGLang's symbols" in well.stdout
    kept_out = run(doctor, SGLANG_PLUGINS="another")
    assert kept_out.returncode == 1
    assert "unset SGLANG_PLUGINS" in kept_out.stdout and "Traceback" not in kept_out.stderr
