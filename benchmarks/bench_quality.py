"""Answers of real models, dense and sparse, through real servers: ``make bench-quality``.

For every model: a plan is calibrated from long chats (``benchmarks.chats``) unless one is given,
one server a configuration starts, on this machine's GPUs in turn, ``kascade eval`` asks all of them
the same prompts, and every (configuration, task, length) becomes a row of ``results``:

    score, dense_score  percent; for perplexity the perplexity itself
    diff                points above dense attention, paired by prompt, so negative is worse; for
                        perplexity the percent by which it is below dense's
    diff_low, diff_high its 95 % interval (bootstrap over prompts)
    prefill_read, decode_read  keys attended to, share of those that dense attention reads
    ttft_ms             median time to the first token of a prompt of this length, server idle;
                        empty with ``--ttft-prompts 0``, for a GPU that does other work, too

A run that was cut off goes on where it ended, given the same ``--work`` folder.
"""

import argparse
import hashlib
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import torch
from scipy.stats import bootstrap

from benchmarks.chats import LENGTHS as CHAT_LENGTHS
from benchmarks.chats import write_chats
from kascade_sglang.calibration.hf_model import load_tokenizer
from kascade_sglang.evaluation.results import Results, SavedReply
from kascade_sglang.files import append_csv
from kascade_sglang.provenance import gpu_provenance
from kascade_sglang.servers.process import Server, run_command, started

RESULTS = Path(__file__).parent / "results/quality_models.csv"
MODELS = ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct")
COLUMNS = """model config phases task length n score dense_score diff diff_low diff_high
    prefill_read decode_read ttft_ms plan gpu versions commit date""".split()
CONFIGS = {"default": "", "decode": "--kascade-phases decode"}
"""What is always measured beside ``dense``: name, and variables and flags of ``sglang serve``."""
TASKS = "ruler,perplexity"
LENGTHS = (4096, 8192, 16384, 31744)
IN_FLIGHT = 4
"""Requests that ``kascade eval`` has under way; a server holds as many contexts."""

Replies = dict[tuple[str, ...], dict[str, SavedReply]]
"""{(task, length, prompts' fingerprint): {number of the prompt: reply}}."""


@dataclass(frozen=True)
class Model:
    """A model on this machine, and what to serve it with. name: its folder's or hub name's end."""

    path: str
    plan: Path
    dense_backend: str | None
    context: int

    @property
    def name(self) -> str:
        """Name in results."""
        return Path(self.path).name.lower()

    def plan_name(self, flags: list[str]) -> str:
        """The plan in results: its name and the first digits of its SHA-256."""
        own = "--kascade-plan" in flags
        plan = Path(flags[flags.index("--kascade-plan") + 1]) if own else self.plan
        return f"{plan.stem}-{hashlib.sha256(plan.read_bytes()).hexdigest()[:8]}"

    def arguments(self, config: str, flags: list[str]) -> list[str]:
        """Arguments of its server; the number of tokens bounds its memory."""
        found = ["--model-path", self.path, "--page-size", "32", "--enable-metrics"]
        found += ["--context-length", str(self.context), "--mem-fraction-static", "0.85"]
        found += ["--max-total-tokens", str(IN_FLIGHT * self.context), "--cuda-graph-max-bs", "8"]
        found += ["--log-level", "warning"]
        if is_dense(config, flags):
            chosen = ["--attention-backend", self.dense_backend] if self.dense_backend else []
            return found + chosen + flags
        if self.dense_backend:
            found += ["--kascade-dense-backend", self.dense_backend]
        found += ["--attention-backend", "kascade", "--kascade-plan", str(self.plan)]
        return found + flags


def is_dense(config: str, flags: list[str]) -> bool:
    """Whether a configuration serves with a backend of SGLang's, ``dense`` or a named one."""
    return config == "dense" or "--attention-backend" in flags


def split(words: str) -> tuple[dict[str, str], list[str]]:
    """Return the variables that a configuration begins with, ``NAME=VALUE``, and its flags."""
    flags = shlex.split(words)
    end = next((n for n, word in enumerate(flags) if word.startswith("-")), len(flags))
    wrong = [word for word in flags[:end] if "=" not in word]
    if wrong:
        raise SystemExit(f"--config: expected NAME=VALUE words, then flags, got {wrong[0]!r}")
    return dict(word.split("=", 1) for word in flags[:end]), flags[end:]


def server_of(model: Model, name: str, words: str, gpu: int, work: Path) -> Server:
    """Return the server of a configuration, not started yet."""
    environment, flags = split(words)
    arguments = [*model.arguments(name, flags), "--base-gpu-id", str(gpu)]
    log = work / f"{model.name}-{name}.server.log"
    return Server(arguments, log, environment=environment)


def calibrated(path: str, work: Path, lengths: tuple[int, ...]) -> Path:
    """Return the model's plan in ``work``; calibrate it where there is none."""
    name = Path(path).name.lower()
    plan, chats = work / f"{name}.json", work / f"{name}.jsonl"
    if not plan.exists():
        if not chats.exists():
            write_chats(path, lengths, chats)
        command = [sys.executable, "-m", "kascade_sglang.cli", "calibrate", "--model", path]
        subprocess.run([*command, "--prompts", str(chats), "--out", str(plan)], check=True)
    return plan


def evaluate(server: Server, model: Model, config: str, options: argparse.Namespace) -> None:
    """Ask one server everything; replies that an earlier run has are not asked for again."""
    command = [sys.executable, "-m", "kascade_sglang.cli", "eval", "--url", server.url]
    command += ["--tasks", options.tasks, "--samples", str(options.samples), "--label", config]
    command += ["--lengths", *map(str, options.lengths), "--tokenizer", model.path]
    command += [
        "--concurrency",
        str(IN_FLIGHT),
        "--seed",
        str(options.seed),
        "--out",
        str(replies_of(model, config, options.work)),
    ]
    log = options.work / f"{model.name}-{config}.eval.log"
    with open(log, "w") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            raise RuntimeError(f"{model.name}, {config}: kascade eval failed; see {log}")


def replies_of(model: Model, config: str, work: Path) -> Path:
    """The file that ``kascade eval`` writes."""
    return work / f"{model.name}-{config}.csv"


def time_to_first_token(url: str, length: int, vocabulary: int, prompts: int) -> str:
    """Median over prompts of random tokens that the server has not seen, in milliseconds."""
    if not prompts:
        return ""
    rng, found = np.random.default_rng(time.time_ns()), []
    for _ in range(prompts + 1):
        ids = rng.integers(vocabulary // 2, size=length - 8).tolist()
        begin = time.perf_counter()
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        httpx.post(f"{url}/generate", json=body, timeout=600, trust_env=False).raise_for_status()
        found.append(1e3 * (time.perf_counter() - begin))
    return f"{statistics.median(found[1:]):.1f}"


def vocabulary_size(model: str) -> int:
    """Tokens that the model's tokenizer knows."""
    return load_tokenizer(model).vocab_size


def paired(ours: list[float], dense: list[float], perplexity: bool) -> dict[str, str]:
    """Scores, difference and its interval. ours, dense: scores 0 to 1, or nats, by prompt."""

    def difference(one: np.ndarray, other: np.ndarray) -> float:
        if perplexity:
            return 100 * (1 - math.exp(one.mean() - other.mean()))
        return 100 * (one.mean() - other.mean())

    one, other = np.array(ours), np.array(dense)
    low = high = found = difference(one, other)
    if len(one) > 1 and (one != other).any():
        interval = bootstrap(
            (one, other), difference, paired=True, vectorized=False, method="percentile", rng=0
        ).confidence_interval
        low, high = interval.low, interval.high
    scores = (math.exp(x.mean()) if perplexity else 100 * x.mean() for x in (one, other))
    score, dense_score = (f"{x:.3f}" if perplexity else f"{x:.2f}" for x in scores)
    shown = {"score": score, "dense_score": dense_score, "n": str(len(one))}
    digits = {"diff": found, "diff_low": low, "diff_high": high}
    return shown | {name: f"{value + 0.0:.2f}" for name, value in digits.items()}


def by_prompt(replies: dict[str, SavedReply]) -> Replies:
    """Sort replies by what was asked."""
    found: Replies = {}
    for key, reply in replies.items():
        _label, _model, task, length, _prompt, _temperature, samples, index = key.split("|")
        found.setdefault((task, length, samples), {})[index] = reply
    return found


def rows_of(
    model: Model, config: str, words: str, work: Path, dense: Replies, ttft: dict[int, str]
) -> Iterator[dict[str, str]]:
    """One row a task and length that both this configuration and ``dense`` have answered.

    dense: its replies, of ``by_prompt``. ttft: by length; what an earlier run asked at others is
    left out.
    """
    results = Results(replies_of(model, config, work))
    ours = by_prompt(results.saved())
    for row in results.rows():
        key = (row["task"], row["length"], row["samples"])
        common = sorted(ours[key].keys() & dense.get(key, {}).keys())
        if not common or (row["length"] and int(row["length"]) not in ttft):
            continue
        pair = ([side[key][index].score for index in common] for side in (ours, dense))
        flags = split(words)[1]
        sparse = "" if is_dense(config, flags) else model.plan_name(flags)
        yield {
            "model": model.name,
            "config": config,
            "phases": phases(config, words),
            "task": row["task"],
            "length": row["length"],
            **paired(*pair, row["task"] == "perplexity"),
            "prefill_read": row["prefill_attended"],
            "decode_read": row["decode_attended"],
            "ttft_ms": ttft[int(row["length"])] if row["length"] else "",
            "plan": sparse,
        }


def phases(config: str, words: str) -> str:
    """Which phases of a configuration are sparse."""
    flags = split(words)[1]
    if is_dense(config, flags):
        return "none"
    return flags[flags.index("--kascade-phases") + 1] if "--kascade-phases" in flags else "both"


def measure(model: Model, configs: dict[str, str], options: argparse.Namespace) -> None:
    """Serve, ask and write the rows of one model."""
    gpus = max(1, torch.cuda.device_count())
    servers = {
        name: server_of(model, name, words, number % gpus, options.work)
        for number, (name, words) in enumerate(configs.items())
    }
    with started(servers.values()):
        with ThreadPoolExecutor(len(configs)) as pool:
            list(pool.map(lambda name: evaluate(servers[name], model, name, options), configs))
        stamp, vocabulary = gpu_provenance(options.commit), vocabulary_size(model.path)
        dense = by_prompt(Results(replies_of(model, "dense", options.work)).saved())
        for name, words in configs.items():
            ttft = {
                length: time_to_first_token(
                    servers[name].url, length, vocabulary, options.ttft_prompts
                )
                for length in options.lengths
            }
            rows = [
                {**row, **stamp} for row in rows_of(model, name, words, options.work, dense, ttft)
            ]
            append_csv(options.out, COLUMNS, rows)
            show(rows)


def show(rows: Iterable[dict[str, str]]) -> None:
    """Print what was measured, a line a row."""
    for row in rows:
        print(*(row[name] for name in COLUMNS[:13]), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", nargs="+", default=MODELS, help="folders or Hugging Face ids")
    add("--plan", type=Path, help="of the one model; without it, one is calibrated")
    add("--config", action="append", default=[], metavar="NAME=WORDS", help="one more to measure")
    add("--only", nargs="+", help="configurations to measure beside dense (all)")
    add("--tasks", default=TASKS, help="of kascade eval")
    add("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, reply included")
    add("--samples", type=int, default=50, help="of each task and length")
    add("--chat-lengths", type=int, nargs="+", default=CHAT_LENGTHS, help="to calibrate from")
    add("--ttft-prompts", type=int, default=5, help="to measure the time to the first token with")
    add("--dense-backend", help="SGLang's backend of dense attention and of layer 0")
    add("--context", type=int, default=32768)
    add("--seed", type=int, default=0)
    add("--work", type=Path, default=Path("quality_work"), help="plans, replies and logs")
    add("--out", type=Path, default=RESULTS)
    add("--commit", help="where this is no repository")
    options = parser.parse_args()
    if options.plan and len(options.model_path) != 1:
        parser.error("--plan: expected one --model-path beside it, got several; name the model")
    wrong = [text for text in options.config if "=" not in text]
    if wrong:
        parser.error(f"--config {wrong[0]}: expected NAME=WORDS, such as fast='--kascade-min-k 64'")
    return options


def main() -> None:
    """Measure every model."""
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    extra = dict(text.split("=", 1) for text in options.config)
    configs = CONFIGS | extra
    if options.only:
        unknown = set(options.only) - set(configs)
        if unknown:
            raise SystemExit(f"--only: expected some of {', '.join(configs)}, got {unknown.pop()}")
        configs = {name: configs[name] for name in options.only}
    for path in options.model_path:
        plan = options.plan or calibrated(path, options.work, tuple(options.chat_lengths))
        model = Model(path, plan, options.dense_backend, options.context)
        measure(model, {"dense": "", **configs}, options)


if __name__ == "__main__":
    sys.exit(run_command(main))
