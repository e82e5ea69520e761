"""Run tasks against a server: make samples, ask, score, write; one task and length at a time."""

import asyncio
import datetime
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import kascade_sglang
from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.endpoint import Endpoint, Reply
from kascade_sglang.evaluation.intervals import score_interval
from kascade_sglang.evaluation.perplexity import NAME as PERPLEXITY
from kascade_sglang.evaluation.perplexity import perplexity_interval
from kascade_sglang.evaluation.results import Results, SavedReply
from kascade_sglang.evaluation.samples import Order, Sample, Task
from kascade_sglang.evaluation.tokens import Tokens
from kascade_sglang.servers.counters import KeyCounters, share_attended

SLACK_TOKENS, SLACK_SHARE = 32, 0.01
"""How far the server's count of a prompt may be from ours: templates add dates and the like."""
DENSE = 0.999
"""Share of keys attended from which on nothing is sparse; layer 0 always reads all."""
NOT_SPARSE = "not sparse: every key was read, so this says nothing about Kascade"
NO_COUNTERS = "no Kascade counters: another backend, or no --enable-metrics"
RESUMED = "resumed: keys read were not counted"
EMPTY = "replies empty"
THOUGHTS = "replies called thoughts by the server's reasoning parser, and scored as what they say"
CUT = "replies cut off at the most tokens that were asked for"
LOUD = (NOT_SPARSE, EMPTY, THOUGHTS)
"""Notes that are warned of: a score beside them may say nothing of the model."""


@dataclass(frozen=True)
class EvalSettings:
    """What the user asks ``kascade eval`` for.

    lengths: tokens of prompt and reply together, for tasks made to a length.
    samples: of each task and length. prompt: one of endpoint.PROMPTS.
    concurrency: requests in flight. timeout: seconds for one reply.
    max_tokens: longest reply, None for the benchmark's own. label: names the run in results.
    note: a remark that every row keeps.
    """

    lengths: tuple[int, ...]
    samples: int
    seed: int
    prompt: str
    concurrency: int
    temperature: float
    timeout: float
    max_tokens: int | None
    label: str
    note: str = ""


class Harness:
    """Runs tasks and writes what comes out.

    on_reply: called with (task, length, replies so far, samples) whenever one has come.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        tokens: Tokens,
        settings: EvalSettings,
        results: Results,
        on_reply: Callable[[str, int | None, int, int], None] = lambda *progress: None,
    ) -> None:
        self._endpoint, self._tokens = endpoint, tokens
        self._settings, self._results = settings, results
        self._on_reply = on_reply
        self._saved = results.saved()

    def run(self, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """Run every task at every length; returns the rows, those of earlier runs included.

        What cannot be made is refused before anything is asked: of samples that are made to a
        length, one is tried. They are made in a thread while others are asked.
        """
        context = self._endpoint.context
        orders = [
            (task, length)
            for task in tasks
            for length in (self._settings.lengths if task.by_length else (None,))
        ]
        for _, length in orders:
            if length is not None and context and length > context:
                raise EvaluationError(
                    f"--lengths {length}: the server's context is {context} tokens; ask for at "
                    "most that, or serve the model with a longer --context-length"
                )
        count, stopped = self._settings.samples, threading.Event()
        tried = [
            self._make(task, length, 1 if task.by_length else count, stopped)
            for task, length in orders
        ]
        # One thread: tokenizers of transformers do not bear several at a time.
        with ThreadPoolExecutor(1) as maker:
            made = [
                maker.submit(self._make, task, length, count, stopped)
                if task.by_length
                else maker.submit(list, samples)  # These are all of them.
                for (task, length), samples in zip(orders, tried, strict=True)
            ]
            try:
                return [
                    self._run_one(task, length, _next(made, number))
                    for number, (task, length) in enumerate(orders)
                ]
            finally:
                stopped.set()
                maker.shutdown(cancel_futures=True)

    def _make(
        self, task: Task, length: int | None, count: int, stopped: threading.Event
    ) -> list[Sample]:
        """Samples that fit the server's context; raises EvaluationError."""
        seed, context = self._settings.seed, self._endpoint.context
        order = Order(length, count, seed, self._tokens, context, stopped.is_set)
        samples = task.make(order)
        for sample in samples:
            self._endpoint.max_tokens(sample, self._tokens.overhead)
        return samples

    def _run_one(self, task: Task, length: int | None, samples: list[Sample]) -> dict[str, Any]:
        key = self._key(task, length, samples)
        done = self._results.find(key)
        if done is not None:
            return done
        before = self._endpoint.key_counters()
        scored = asyncio.run(self._ask_all(key, samples))
        row = {**key, **self._row(task, samples, scored, before)}
        self._results.add(row)
        return row

    def _key(self, task: Task, length: int | None, samples: list[Sample]) -> dict[str, str]:
        """The cells that say what is measured."""
        settings = self._settings
        digests = [sample.digest() for sample in samples]
        text = "".join([*digests, str(settings.max_tokens)])
        if self._endpoint.template:
            text += json.dumps(self._endpoint.template, sort_keys=True)
        return {
            "label": settings.label,
            "model": self._endpoint.model,
            "task": task.name,
            "length": "" if length is None else str(length),
            "prompt": settings.prompt,
            "temperature": str(settings.temperature),
            "samples": hashlib.sha256(text.encode()).hexdigest()[:12],
        }

    async def _ask_all(self, key: dict[str, str], samples: list[Sample]) -> list[SavedReply]:
        """Ask what no earlier run has asked; each reply is on disk before the next is counted."""
        gate = asyncio.Semaphore(self._settings.concurrency)
        done = 0
        async with self._endpoint.client(self._settings.timeout) as client:

            async def one(index: int, sample: Sample) -> SavedReply:
                nonlocal done
                name = "|".join([*key.values(), str(index)])
                found = self._saved.get(name)
                if found is None:
                    async with gate:
                        found = await self._ask(client, sample)
                    self._saved[name] = found
                    self._results.save(name, key["task"], sample.answers, found)
                done += 1
                self._on_reply(key["task"], int(key["length"] or 0) or None, done, len(samples))
                return found

            asked = [asyncio.ensure_future(one(i, sample)) for i, sample in enumerate(samples)]
            try:
                return list(await asyncio.gather(*asked))
            finally:
                for request in asked:
                    request.cancel()
                await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self, client: Any, sample: Sample) -> SavedReply:
        most = self._endpoint.max_tokens(sample, self._tokens.overhead)
        settings = self._settings
        if settings.max_tokens is not None and not sample.ids:
            most = min(settings.max_tokens, most or settings.max_tokens)
        reply = await self._endpoint.ask(
            client, sample, settings.prompt, most, settings.temperature
        )
        self._check_length(sample, reply)
        score = sample.score(reply.text) if reply.loss is None else reply.loss
        return SavedReply(score, reply)

    def _check_length(self, sample: Sample, reply: Reply) -> None:
        """Refuse a tokenizer that is not the server's; lengths would be wrong."""
        chat = not sample.raw and self._settings.prompt != "completion"
        counted = sample.tokens + (self._tokens.overhead if chat else 0)
        slack = max(SLACK_TOKENS, SLACK_SHARE * counted)
        if reply.prompt_tokens and abs(reply.prompt_tokens - counted) > slack:
            raise EvaluationError(
                f"--tokenizer: counts {counted} tokens in a prompt where the server counts "
                f"{reply.prompt_tokens}; give the tokenizer of the served model"
            )

    def _row(
        self, task: Task, samples: list[Sample], scored: list[SavedReply], before: KeyCounters
    ) -> dict[str, Any]:
        """The cells that were measured."""
        scores = [saved.score for saved in scored]
        if task.metric == PERPLEXITY:
            score, low, high = (f"{value:.4f}" for value in perplexity_interval(scores))
        else:
            mean = math.fsum(scores) / len(scores)
            score, low, high = (f"{100 * value:.2f}" for value in (mean, *score_interval(scores)))
        after = self._endpoint.key_counters()
        prefill, decode = (share_attended(before, after, phase) for phase in ("prefill", "decode"))
        replies = [saved.reply for saved in scored]
        template = dict(self._endpoint.template)
        return {
            "n": len(scores),
            "score": score,
            "low": low,
            "high": high,
            "metric": task.metric,
            "prompt_tokens": round(_mean([reply.prompt_tokens for reply in replies])),
            "output_tokens": round(_mean([reply.output_tokens for reply in replies])),
            "prefill_attended": "" if prefill is None else f"{prefill:.4f}",
            "decode_attended": "" if decode is None else f"{decode:.4f}",
            "seconds": f"{_mean([reply.seconds for reply in replies]):.2f}",
            "seed": self._settings.seed,
            "data": task.data,
            "note": "; ".join(
                [
                    *filter(None, [self._settings.note]),
                    *_notes_on_keys(after, prefill, decode),
                    *_notes_on_replies(samples, replies),
                    *([f"template: {json.dumps(template)}"] if template else []),
                ]
            ),
            "version": kascade_sglang.__version__,
            "date": datetime.date.today().isoformat(),
        }


def _next(made: Sequence["Future[list[Sample]]"], number: int) -> list[Sample]:
    """Wait for the samples of an order; raises at once what any other order has met."""
    for future in made:
        if future.done():
            future.result()
    return made[number].result()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _notes_on_keys(
    after: KeyCounters, prefill: float | None, decode: float | None
) -> Iterator[str]:
    """What a reader of the shares must know."""
    shares = [share for share in (prefill, decode) if share is not None]
    if not after:
        yield NO_COUNTERS
    elif not shares:
        yield RESUMED
    elif min(shares) >= DENSE:
        yield NOT_SPARSE


def _notes_on_replies(samples: Sequence[Sample], replies: Sequence[Reply]) -> Iterator[str]:
    """What a reader of the score must know."""
    cut = sum(sample.cut for sample in samples)
    if cut:
        yield f"the middle of {cut} prompts was cut out to fit the context"
    texts = [reply for sample, reply in zip(samples, replies, strict=True) if not sample.ids]
    found = {
        EMPTY: sum(not reply.text.strip() for reply in texts),
        THOUGHTS: sum(reply.thought for reply in texts),
        CUT: sum(reply.finish == "length" for reply in texts),
    }
    yield from (f"{count} of {len(texts)} {what}" for what, count in found.items() if count)
