"""Mixed load on one server for a while, every reply checked: ``make soak``.

Each prompt is asked alone first. Then clients ask prompts of all lengths at once, some of them
turns of conversations, some bound to a JSON schema, and abort some, while the KV pool is too small
for all of them. Every minute all wait, and in turn the prefix cache is emptied, weights are loaded
again and the KV pool's memory is released and taken back (the latter two with a real model). With
determinism asked for, a reply must have the tokens and log probabilities that it had alone; one
that was retracted must have its length: what it had generated is then computed anew as a prompt,
whose tiles of queries share a selection.
"""

import argparse
import asyncio
import itertools
import json
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
COLUMNS = """model minutes clients longest requests conversations structured compared aborted
    flushed updated released retracted wrong_length different failed memory_first_mb memory_last_mb
    flags gpu versions commit date""".split()
VOCABULARY = 1000
"""Token ids that every model has."""
ABORT_SHARE = 0.1
FLUSH_SECONDS = 60
TURNS = 3
MOST_GROWTH_MB = 1024
"""Of memory under load, over that of prompts alone: batches of many requests take more."""
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
STRUCTURED_TOKENS = 64


class Prompt:
    """Random token ids, how many to generate, and the reply when nothing else runs.

    after: the turn of a conversation before it, whose tokens it begins with. What the model said
    stays out: that a prefix was generated, and not read, makes another reply.
    structured: whether the reply is bound to ``SCHEMA``.
    """

    def __init__(
        self,
        draw: random.Random,
        longest: int,
        outputs: int,
        after: "Prompt | None" = None,
        structured: bool = False,
    ) -> None:
        def log_uniform(low: int, high: int) -> int:
            return round(math.exp(draw.uniform(math.log(low), math.log(high))))

        new = [draw.randrange(3, VOCABULARY) for _ in range(log_uniform(16, longest))]
        self.ids = [*(after.ids if after else ()), *new]
        self.outputs = STRUCTURED_TOKENS if structured else log_uniform(8, outputs)
        self.after, self.structured = after, structured
        self.alone: list[Any] = []

    def body(self) -> dict[str, Any]:
        """Return the request for /generate."""
        sampling = {"max_new_tokens": self.outputs, "temperature": 0}
        if self.structured:
            sampling["json_schema"] = json.dumps(SCHEMA)
        else:
            sampling["ignore_eos"] = True
        return {"input_ids": self.ids, "sampling_params": sampling, "return_logprob": True}

    def turns(self) -> list["Prompt"]:
        """Return the conversation up to here."""
        return [*(self.after.turns() if self.after else ()), self]

    def is_answered_by(self, reply: dict[str, Any]) -> bool:
        """Whether a reply is as long, or of the form, that was asked for."""
        if not self.structured:
            return reply["meta_info"]["completion_tokens"] == self.outputs
        try:
            said = json.loads(reply["text"])
        except ValueError:
            return False
        return said.keys() == set(SCHEMA["required"]) and said["colour"] in ("red", "blue")


def draw_prompts(count: int, longest: int, outputs: int, structured: bool) -> list[Prompt]:
    """Draw prompts: in turn one alone, one bound to a schema where asked, and a conversation."""
    draw, prompts = random.Random(0), []
    for index in range(count):
        kind = index % 3
        if kind == 2:
            turn = None
            for _ in range(TURNS):
                turn = Prompt(draw, longest // TURNS, outputs, turn)
            prompts.append(turn)
        else:
            prompts.append(Prompt(draw, longest, outputs, structured=structured and kind == 1))
    return prompts


class Load:
    """Clients that ask until a deadline; ``counts`` holds what happened.

    model: what weights are loaded again from; None where there are none.
    """

    def __init__(
        self, server: Server, prompts: list[Prompt], compare: bool, model: str | None = None
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._server = server
        self._client = httpx.AsyncClient(
            base_url=server.url, timeout=600, limits=httpx.Limits(), trust_env=False
        )
        self._prompts, self._compare, self._model = prompts, compare, model
        self._may_ask = asyncio.Event()
        self._ending = asyncio.Event()
        self._running = 0

    async def ask_alone(self) -> None:
        """Ask every prompt by itself."""
        turns = [turn for prompt in self._prompts for turn in prompt.turns()]
        for prompt in tqdm(turns, desc="alone", unit="prompt"):
            reply = await self._ask(prompt)
            prompt.alone = reply["meta_info"]["output_token_logprobs"]

    async def run(self, clients: int, seconds: float) -> None:
        """Ask from ``clients`` tasks for ``seconds``; disturb the server now and then."""
        end = time.monotonic() + seconds
        self._may_ask.set()
        tasks = [asyncio.create_task(self._keep_asking(seed, end)) for seed in range(clients)]
        disturber = asyncio.create_task(self._keep_disturbing())
        with tqdm(total=round(seconds), desc="load", unit="s") as bar:
            while time.monotonic() < end:
                await asyncio.sleep(1)
                self._server.require_running()
                if disturber.done():
                    disturber.result()
                bar.update()
        # Not in the middle: memory that was released must come back.
        self._ending.set()
        await disturber
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
                    continue
                self.counts["conversations"] += prompt.after is not None
                for turn in prompt.turns():
                    self._check(turn, await self._ask(turn))
            except (httpx.HTTPError, KeyError) as error:
                self.counts["failed"] += 1
                tqdm.write(f"soak: {type(error).__name__}: {error}")
            finally:
                self._running -= 1

    async def _ask(self, prompt: Prompt) -> dict[str, Any]:
        reply = await self._client.post("/generate", json=prompt.body())
        reply.raise_for_status()
        return reply.json()

    def _check(self, prompt: Prompt, reply: dict[str, Any]) -> None:
        meta = reply["meta_info"]
        self.counts["requests"] += 1
        self.counts["structured"] += prompt.structured
        self.counts["wrong_length"] += not prompt.is_answered_by(reply)
        if self._compare and not meta.get("num_retractions"):
            self.counts["compared"] += 1
            self.counts["different"] += meta["output_token_logprobs"] != prompt.alone

    async def _abort(self, prompt: Prompt, seconds: float) -> None:
        """Hang up after a while, as a user who closes the page."""
        self.counts["aborted"] += 1
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ask(prompt), seconds)

    async def _keep_disturbing(self) -> None:
        ways = [self._flush, self._update, self._release] if self._model else [self._flush]
        for way in itertools.cycle(ways):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ending.wait(), FLUSH_SECONDS)
            if self._ending.is_set():
                return
            self._may_ask.clear()
            while self._running:
                await asyncio.sleep(0.1)
            await way()
            self._may_ask.set()

    async def _update(self) -> None:
        """Load the same weights again."""
        await self._flush()
        path = {"model_path": self._model}
        reply = await self._client.post("/update_weights_from_disk", json=path)
        self.counts["updated"] += reply.status_code == 200 and reply.json()["success"]

    async def _release(self) -> None:
        """Give the KV pool's memory away and take it back."""
        await self._flush()
        tags, done = {"tags": ["kv_cache"]}, True
        for way in ("release", "resume"):
            reply = await self._client.post(f"/{way}_memory_occupation", json=tags)
            done &= reply.status_code == 200
        self.counts["released"] += done

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
    load = Load(server, prompts, options.deterministic, options.weights)
    with PeakMemory() as first:
        await load.ask_alone()
    with PeakMemory() as last:
        await load.run(options.clients, options.seconds)
    names = COLUMNS[COLUMNS.index("requests") : COLUMNS.index("memory_first_mb")]
    return {
        "minutes": round(options.seconds / 60, 1),
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
    parser.add_argument(
        "--model",
        default="llama-3.1-8b",
        help=f"folder of a model, or a shape without weights: {', '.join(ANCHORS)}",
    )
    parser.add_argument("--seconds", type=float, default=1200)
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
    options.weights = None if options.model in ANCHORS else options.model
    if options.weights:
        arguments = ["--model-path", options.weights, "--enable-memory-saver"]
        arguments += ["--constrained-json-disable-any-whitespace"]
    else:
        arguments = ["--model-path", str(make_shape(options.model, folder))]
        arguments += ["--load-format", "dummy"]
    arguments += ["--attention-backend", "kascade", "--enable-metrics", "--log-level", "warning"]
    structured = options.weights is not None
    prompts = draw_prompts(options.prompts, options.longest, options.outputs, structured)
    with Server([*arguments, *flags], folder / "log") as server:
        figures = asyncio.run(soak(server, prompts, options))
        healthy = server.is_healthy()
    row = {"model": Path(options.model).name, **figures, "flags": " ".join(flags)}
    row |= gpu_provenance(options.commit)
    append_csv(options.out, COLUMNS, [row])
    print(*(f"{name}: {row[name]}" for name in COLUMNS[: COLUMNS.index("flags")]), sep="\n")
    wrong = sum(figures[name] for name in ("wrong_length", "different", "failed"))
    grown = (figures["memory_last_mb"] or 0) - (figures["memory_first_mb"] or 0)
    return 0 if healthy and not wrong and grown <= MOST_GROWTH_MB else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
