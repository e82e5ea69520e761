"""Servers that die, and files that are replaced under them: what client, command and log say."""

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.servers.demo_model import MODEL, demo_arguments
from kascade_sglang.servers.process import Server, ServerError
from tests.support.requests import generate, prompt_ids, tokens_and_logprobs

pytestmark = pytest.mark.e2e

EVAL = [sys.executable, "-m", "kascade_sglang.cli", "eval", "--tokenizer", str(MODEL)]
LARGEST_FILE = 2000
ROOM = 4 * 2**20
"""Bytes of address space left where memory is to run out."""


def scheduler(server: Server) -> psutil.Process:
    """The process that holds the model."""
    children = psutil.Process(server._process.pid).children(recursive=True)
    [found] = [child for child in children if "scheduler" in child.name()]
    return found


def linked_model(folder: Path) -> Path:
    """The demo model, with a plan of its own to replace."""
    folder.mkdir()
    for path in MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    plan = folder / PLAN_NAME
    text = plan.read_bytes()
    plan.unlink()
    plan.write_bytes(text)
    return folder


def evaluate_on_a_full_disk(command: list[str], replies: Path) -> str:
    """Files may be so large and no larger: of a last line a part is written. Returns replies."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        command, preexec_fn=limit, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    said = run.stderr.strip().splitlines()
    assert run.returncode == 1 and said[-1].startswith("kascade: --out "), run.stderr
    kept = replies.read_text()
    assert kept.endswith("\n") and 0 < len(kept) <= LARGEST_FILE
    return kept


def test_an_evaluation_whose_disk_is_full_and_whose_server_is_killed(tmp_path: Path) -> None:
    """Before that the plan is replaced: what a server was started with stays in force."""
    model, out = linked_model(tmp_path / "model"), tmp_path / "results.csv"
    replies = tmp_path / "results.replies.jsonl"
    arguments = demo_arguments("kascade")
    arguments[arguments.index("--model-path") + 1] = str(model)
    with (
        pytest.raises(ServerError, match=r"crashed with exit code -9.*; its log: ") as died,
        Server(arguments, tmp_path / "log") as server,
    ):
        ids = prompt_ids(3, 700)
        before = tokens_and_logprobs(generate(server, ids, 4))
        (model / PLAN_NAME).write_text("{}")
        httpx.post(f"{server.url}/flush_cache", trust_env=False)
        assert tokens_and_logprobs(generate(server, ids, 4)) == before

        wanted = ["--tasks", "niah_single_1", "--lengths", "1024", "--samples", "60"]
        command = [*EVAL, *wanted, "--url", server.url, "--out", str(out)]
        kept = evaluate_on_a_full_disk(command, replies)
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while run.poll() is None and len(replies.read_text()) <= len(kept):
            time.sleep(0.1)
        scheduler(server).kill()
        said = run.communicate(timeout=200)[1].strip().splitlines()
        assert run.returncode == 1 and said[-1].startswith("kascade: ")
        assert not any(line.startswith("Traceback") for line in said)
        assert replies.read_text().startswith(kept) and replies.read_text().endswith("\n")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url}/health", trust_env=False).raise_for_status()
    assert len(str(died.value).splitlines()) == 1


def test_memory_that_runs_out_in_a_prefill(tmp_path: Path) -> None:
    """The client's request ends, and the command says what the scheduler ended for."""
    with (
        pytest.raises(ServerError, match=r"alloc.*; its log: ") as died,
        Server(demo_arguments("kascade"), tmp_path / "log") as server,
    ):
        process, draw = scheduler(server), random.Random(0)
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + ROOM,) * 2)
        body = {"input_ids": [draw.randrange(3, 900) for _ in range(8000)]}
        httpx.post(f"{server.url}/generate", json=body, timeout=100, trust_env=False)
    assert len(str(died.value).splitlines()) == 1
