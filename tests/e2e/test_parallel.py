"""Real servers on two GPUs, or replicas on a CPU: ranks, stages and replicas answer as one does."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from sglang.srt.utils.numa_utils import init_threads_binding
from transformers import AutoModelForCausalLM

from kascade_sglang.demo.__main__ import documents
from kascade_sglang.evaluation.methods import without_head_map
from kascade_sglang.servers.counters import KeyCounters, read_key_counters
from kascade_sglang.servers.demo_model import MODEL, demo_arguments
from kascade_sglang.servers.process import Server
from tests.support.requests import REPLIES, ask_everything, generate, prompt_ids, shipped_plan

pytestmark = pytest.mark.e2e
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def replies_and_reads(
    flags: list[str], log: Path, **environment: str
) -> tuple[dict[str, str], KeyCounters]:
    """Ask the demo's questions, on a CPU those about one document: it takes a minute for each.

    Returns replies, and what one request more reads.
    """
    about = documents() if torch.cuda.is_available() else documents()[:1]
    with Server([*demo_arguments("kascade"), *flags], log, environment=environment) as server:
        replies = ask_everything(server, about)
        before = read_key_counters(server.url)
        generate(server, prompt_ids(3, 3000), 24)
        after = read_key_counters(server.url)
    return replies, {key: after[key] - before[key] for key in after}


def assert_answers_as_the_cpu(replies: dict[str, str], reads: KeyCounters) -> None:
    expected = json.loads(REPLIES.read_text())
    assert len(replies) >= 8 and replies == {question: expected[question] for question in replies}
    assert 0 < reads["decode", "attended"] < reads["decode", "dense"]


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """The demo model with its own output layer: SGLang shares none between stages."""
    path = tmp_path / "model"
    shutil.copytree(MODEL, path)
    model = AutoModelForCausalLM.from_pretrained(MODEL, tie_word_embeddings=False)
    model.lm_head.weight.data.copy_(model.get_input_embeddings().weight.data)
    model.save_pretrained(path)
    return path


@two_gpus
def test_stages_answer_as_the_cpu(untied: Path, tmp_path: Path) -> None:
    flags = ["--model-path", str(untied), "--pp-size", "2"]
    assert_answers_as_the_cpu(*replies_and_reads(flags, tmp_path / "log"))


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs or none")
def test_replicas_answer_as_the_cpu(tmp_path: Path) -> None:
    # On a CPU with fewer NUMA nodes than replicas, releases from 0.5.19 on must be told the cores;
    # those before count one replica's ranks alone, and take no more entries.
    bound = "world_size" in inspect.signature(init_threads_binding).parameters
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if bound else {}
    assert_answers_as_the_cpu(*replies_and_reads(["--dp-size", "2"], tmp_path / "log", **cores))


@two_gpus
def test_ranks_reuse_within_their_own_heads(tmp_path: Path) -> None:
    """The model has two KV heads, so that each of two ranks can only map its head to itself."""
    plan = tmp_path / "plan.json"
    without_head_map(shipped_plan()).save(plan)
    one = replies_and_reads(["--kascade-plan", str(plan)], tmp_path / "one")
    two = replies_and_reads(["--tp-size", "2"], tmp_path / "two")
    assert one == two
