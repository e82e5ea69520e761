"""SGLang's benchmark tools, which start SGLang in their own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_serving import COLUMNS, measure
from benchmarks.serving_workloads import Workload
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.servers.process import Server
from tests.e2e.test_commands import KASCADE, run
from tests.support.models import LLAMA, make_plan
from tests.support.servers import everyday

pytestmark = pytest.mark.e2e


def bench(tool: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "kascade_sglang.bench", tool, *KASCADE, *flags])


def test_bench_one_batch(tmp_path: Path) -> None:
    """The tool draws token ids up to 10,000, so it gets a model of random weights."""
    config = {**LLAMA, "vocab_size": 16384}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_plan().save(tmp_path / "kascade_plan.json")
    flags = [
        "--tokenizer-path",
        str(MODEL),
        "--load-format",
        "dummy",
        "--dtype",
        "float32",
        "--max-total-tokens",
        "4096",
        "--mem-fraction-static",
        "0.5",
    ]
    shape = ["--batch-size", "2", "--input-len", "300", "--output-len", "4", "--run-name", "test"]
    result = bench(
        "one_batch", "--model-path", str(tmp_path), *flags, *shape,
        "--result-filename", str(tmp_path / "out.jsonl"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])
    assert row["batch_size"] == 2 and row["median_decode_throughput"] > 0


def test_bench_offline_throughput(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Where does the keeper live? " * 40}]
    turns.append({"from": "gpt", "value": "The keeper lives in room 4412. " * 4})
    dataset = tmp_path / "sharegpt.json"
    dataset.write_text(json.dumps([{"conversations": turns}] * 20))
    out = tmp_path / "out.jsonl"
    result = bench(
        "offline_throughput", "--model-path", str(MODEL), "--dataset-path", str(dataset),
        "--num-prompts", "4", "--dtype", "float32", "--max-total-tokens", "16384",
        "--mem-fraction-static", "0.5", "--skip-warmup", "--result-filename", str(out),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(out.read_text().splitlines()[-1])["successful_requests"] == 4


@everyday
def test_conversations_are_sent_turn_by_turn(server: Server, tmp_path: Path) -> None:
    workload = Workload(2, 400, 8, "output_tokens_per_s", 0, prefix=320, groups=2, turns=3)
    figures = measure(server, MODEL, workload, float("inf"), tmp_path)
    assert figures["requests"] == 6 and figures["output_tokens"] == 6 * 8
    # Of six prompts the first of each conversation is new, and each turn sends those before it.
    assert figures["prompt_tokens_served"] > 4 * 400 and figures["cache_hit_rate"] > 0.5


@everyday
def test_every_request_gets_what_it_asks_for(server: Server, tmp_path: Path) -> None:
    plain = Workload(2, 300, 4, "itl_p50_ms", 2.0)
    rag = Workload(4, 320, 4, "ttft_p99_ms", 1.2, prefix=256, groups=2, arrivals=0.8)
    plain_row = measure(server, MODEL, plain, float("inf"), tmp_path)
    rag_row = measure(server, MODEL, rag, 1.0, tmp_path)
    assert (plain_row["input_tokens"], plain_row["output_tokens"]) == (600, 8)
    assert rag_row["input_tokens"] >= 4 * 320
    assert rag_row["cache_hit_rate"] > 0.05
    assert set(COLUMNS) >= set(rag_row)
