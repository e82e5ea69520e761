"""Mixed load on one server for a while, every reply checked: ``make soak``.

Each prompt is asked alone first. Then clients ask prompts of all lengths at once, abort some, and
empty the prefix cache now and then, while the KV pool is too small for all of them. With
determinism asked for, a reply must have the tokens and log probabilities that it had alone; one
that was retracted must have its length: what it had generated is then computed anew as a prompt,
whose tiles of queries share a selection.
"""

import argparse
import asyncio
import math
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from tqdm import tqdm

from benchmarks.bench_serving import PeakMemory
from benchmarks.serving_model import ANCHORS, make_shape
from kascade_sglang.files import append_csv
from kascade_sglang.provenance import gpu_provenance
from kascade_sglang.servers.counters import read_samples
from kascade_sglang.servers.process import Server, run_command

RESULTS = Path(__file__).parent / "results/soak_h100.csv"
COLUMNS = """model minutes clients longest requests compared aborted flushed retracted wrong_length
    different failed memory_first_mb memory_last_mb flags gpu versions commit date""".split()
VOCABULARY = 1000
"""Token ids that every model has."""
ABORT_SHARE = 0.1
FLUSH_SECONDS = 60


class Prompt:
    """Random token ids, how many to generate, and the reply when nothing else runs."""

    def __init__(self, draw: random.Random, longest: int, outputs: int) -> None:
        def log_uniform(low: int, high: int) -> int:
            return round(math.exp(draw.uniform(math.log(low), math.log(high))))

        self.ids = [draw.randrange(3, VOCABULARY) for _ in range(log_uniform(16, longest))]
        self.outputs = log_uniform(8, outputs)
        self.alone: list[Any] = []

    def body(self) -> dict[str, Any]:
        """Return the request for /generate."""
        sampling = {"max_new_tokens": self.outputs, "temperature": 0, "ignore_eos": True}
        return {"input_ids": self.ids, "sampling_params": sampling, "return_logprob": True}


class Load:
    """Clients that ask until a deadline; ``counts`` holds what happened."""

    def __init__(self, server: Server, prompts: list[Prompt], compare: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._server = server
        self._client = httpx.AsyncClient(
            base_url=server.url, timeout=600, limits=httpx.Limits(), trust_env=False
        )
        self._prompts, self._compare = prompts, compare
        self._may_ask = asyncio.Event()
        self._running = 0

    async def ask_alone(self) -> None:
        """Ask every prompt by itself."""
        for prompt in tqdm(self._prompts, desc="alone", unit="prompt"):
            prompt.alone = (await self._ask(prompt))["output_token_logprobs"]

    async def run(self, clients: int, seconds: float) -> None:
        """Ask from ``clients`` tasks for ``seconds``; empty the cache now and then, and last."""
        end = time.monotonic() + seconds
        self._may_ask.set()
        tasks = [asyncio.create_task(self._keep_asking(seed, end)) for seed in range(clients)]
        flusher = asyncio.create_task(self._keep_flushing())
        with tqdm(total=round(seconds), desc="load", unit="s") as bar:
            while time.monotonic() < end:
                await asyncio.sleep(1)
                self._server.require_running()
                bar.update()
        flusher.cancel()
        self._may_ask.set()
        await asyncio.gather(*tasks)
        await self._flush()
        await self._client.aclose()

    async def _keep_asking(self, seed: int, end: float) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            await self._may_ask.wait()
            self._running += 1
            prompt = draw.choice(self._prompts)
            try:
                if draw.random() < ABORT_SHARE:
                    await self._abort(prompt, draw.random() * 2)
                else:
                    self._check(prompt, await self._ask(prompt))
            except (httpx.HTTPError, KeyError) as error:
                self.counts["failed"] += 1
                tqdm.write(f"soak: {type(error).__name__}: {error}")
            finally:
                self._running -= 1

    async def _ask(self, prompt: Prompt) -> dict[str, Any]:
        reply = await self._client.post("/generate", json=prompt.body())
        reply.raise_for_status()
        return reply.json()["meta_info"]

    def _check(self, prompt: Prompt, meta: dict[str, Any]) -> None:
        self.counts["requests"] += 1
        self.counts["wrong_length"] += meta["completion_tokens"] != prompt.outputs
        if self._compare and not meta.get("num_retractions"):
            self.counts["compared"] += 1
            self.counts["different"] += meta["output_token_logprobs"] != prompt.alone

    async def _abort(self, prompt: Prompt, seconds: float) -> None:
        """Hang up after a while, as a user who closes the page."""
        self.counts["aborted"] += 1
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ask(prompt), seconds)

    async def _keep_flushing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self._may_ask.clear()
            while self._running:
                await asyncio.sleep(0.1)
            await self._flush()
            self._may_ask.set()

    async def _flush(self) -> None:
        """Empty the prefix cache; aborted requests may still be running for a moment."""
        reply = await self._client.post("/flush_cache", params={"timeout": 30})
        self.counts["flushed"] += reply.status_code == 200


def retracted(server: Server) -> int:
    """Retractions that the server has counted."""
    name = "sglang:num_retracted_requests_total"
    return int(sum(sample.value for sample in read_samples(server.url) if sample.name == name))


async def soak(server: Server, prompts: list[Prompt], options: argparse.Namespace) -> dict:
    """Run the load; returns the row's figures. Memory while prompts are alone is the baseline."""
    load = Load(server, prompts, options.deterministic)
    with PeakMemory() as first:
        await load.ask_alone()
    with PeakMemory() as last:
        await load.run(options.clients, options.minutes * 60)
    names = ("requests", "compared", "aborted", "flushed", "wrong_length", "different", "failed")
    return {
        "minutes": options.minutes,
        "clients": options.clients,
        "longest": max(len(prompt.ids) for prompt in prompts),
        **{name: load.counts[name] for name in names},
        "retracted": retracted(server),
        "memory_first_mb": first.mib or "",
        "memory_last_mb": last.mib or "",
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--model", choices=ANCHORS, default="llama-3.1-8b", help="shape to serve")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--longest", type=int, default=65536, help="tokens of a prompt")
    parser.add_argument("--outputs", type=int, default=1024, help="most tokens of a reply")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write as the commit, outside a repository")
    parser.add_argument(
        "--no-deterministic",
        dest="deterministic",
        action="store_false",
        help="do not ask for determinism, and compare nothing but lengths",
    )
    parser.add_argument(
        "server_flags",
        nargs="*",
        default=["--mem-fraction-static", "0.42", "--schedule-conservativeness", "0.05"],
        help="after --: flags for the server; by default it has too little memory for all "
        "requests, and starts more of them than it can finish",
    )
    return parser.parse_args()


def main() -> int:
    """Soak one server; exit status 1 where anything went wrong."""
    options = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("soak: expected a CUDA GPU, got none; run it on a machine that has one")
    folder = Path(tempfile.mkdtemp(prefix="kascade-soak-"))
    flags = ["--page-size", "32", *options.server_flags]
    flags += ["--enable-deterministic-inference"] if options.deterministic else []
    arguments = ["--model-path", str(make_shape(options.model, folder)), "--load-format", "dummy"]
    arguments += ["--attention-backend", "kascade", "--enable-metrics", "--log-level", "warning"]
    draw = random.Random(0)
    prompts = [Prompt(draw, options.longest, options.outputs) for _ in range(options.prompts)]
    with Server([*arguments, *flags], folder / "log") as server:
        figures = asyncio.run(soak(server, prompts, options))
        healthy = server.is_healthy()
    row = {"model": options.model, **figures, "flags": " ".join(flags)}
    row |= gpu_provenance(options.commit)
    append_csv(options.out, COLUMNS, [row])
    print(*(f"{name}: {row[name]}" for name in COLUMNS[:12]), sep="\n")
    wrong = sum(figures[name] for name in ("wrong_length", "different", "failed"))
    return 0 if healthy and not wrong else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
