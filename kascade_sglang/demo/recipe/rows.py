"""Training rows: a document with many questions in one chat, as token ids and loss classes."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kascade_sglang.demo.recipe.encoding import Encoder
from kascade_sglang.text.documents import Item, compose

PAD, REST, ANSWER = 0, 1, 2
# Rows of every length fill the same number of tokens, so the GPU code is compiled once.
BATCH_TOKENS = 69_632
LENGTHS = (544, 1088, 2176, 4352, 8704)
QUESTIONS = {544: 6, 1088: 14, 2176: 22, 4352: 30, 8704: 36}
TASK_SHARES = {
    "single_key": 0.2,
    "multi_key": 0.35,
    "multi_hop": 0.17,
    "which_document": 0.16,
    "counting": 0.12,
}

Texts = Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Chat:
    """Writes chats as ids and loss classes, exactly as the chat template would."""

    encoder: Encoder

    def turn(self, role: str, parts: Sequence[str], kind: int) -> tuple[list[int], list[int]]:
        """One message; ``kind`` is the loss class of its text and of its end token."""
        ids = [self.encoder.special(f"<|{role}|>")]
        for part in parts:
            ids += self.encoder.encode(part)
        ids.append(self.encoder.special("<|end|>"))
        return ids, [REST] + [kind] * (len(ids) - 1)

    def row(self, pieces: Sequence[str], items: Sequence[Item], length: int) -> np.ndarray:
        """A document and as many of the questions as fit, in ``length`` tokens."""
        ids = [self.encoder.special("<|bos|>")]
        kinds = [PAD]
        opening = [*pieces, "\n\n"]
        for item in items:
            asked, asked_kinds = self.turn("user", [*opening, item.question.text], REST)
            told, told_kinds = self.turn("assistant", [item.reply], ANSWER)
            if len(ids) + len(asked) + len(told) > length:
                break
            ids += asked + told
            kinds += asked_kinds + told_kinds
            opening = []
        padding = length - len(ids)
        ids += [self.encoder.special("<|pad|>")] * padding
        return np.array([ids, kinds + [PAD] * padding], dtype=np.uint16)


def copy_row(rng: random.Random, length: int) -> np.ndarray:
    """Random tokens, each stretch of them twice: teaches a new model to look back and copy."""
    ids: list[int] = []
    kinds: list[int] = []
    while len(ids) < length:
        size = rng.randint(8, 120)
        stretch = [rng.randrange(6, 4096) for _ in range(size)]
        ids += stretch + stretch
        kinds += [PAD] * (size + 1) + [ANSWER] * (size - 1)
    return np.array([ids[:length], kinds[:length]], dtype=np.uint16)


def training_row(rng: random.Random, chat: Chat, texts: Texts, length: int) -> np.ndarray:
    """A fresh document of this length with questions on most of its facts."""
    wanted = round(QUESTIONS[length] * rng.uniform(0.7, 1.3))
    shares = dict(TASK_SHARES)
    if rng.random() < 0.4:
        del shares["which_document"]
    if rng.random() < 0.5:
        del shares[rng.choice(sorted(shares))]
    drawn = rng.choices(list(shares), list(shares.values()), k=wanted)
    counts = {task: drawn.count(task) for task in shares}
    room = length - 30 * wanted - 8 * counts.get("multi_hop", 0) - 8
    if length > 1088 and rng.random() < 0.15:
        room = round(room * rng.uniform(0.5, 1.0))
    try:
        draft = compose(rng, "train", counts, room, chat.encoder.count, texts)
    except ValueError:  # Too many facts were drawn for so short a row.
        return training_row(rng, chat, texts, length)
    items = list(draft.items)
    rng.shuffle(items)
    return chat.row(draft.pieces, items, length)


def batch(seed: int, step: int, length: int, copies: float, chat: Chat, texts: Texts) -> np.ndarray:
    """The batch of one step: [ids or classes, row, place]; ``copies`` is the share to copy."""
    rng = random.Random(f"{seed}-{step}")
    rows = [
        copy_row(rng, length) if rng.random() < copies else training_row(rng, chat, texts, length)
        for _ in range(BATCH_TOKENS // length)
    ]
    return np.stack(rows, axis=1)


class Feed:
    """Makes the batches of a schedule in worker processes, and yields them in order."""

    def __init__(
        self,
        schedule: Sequence[tuple[int, float]],
        first: int,
        seed: int,
        chat: Chat,
        texts: Texts,
        workers: int,
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.steps = range(first, len(schedule))
        self.queues = [context.Queue(maxsize=6) for _ in range(workers)]
        self.processes = []
        for number, queue in enumerate(self.queues):

            def work(number: int = number, queue: multiprocessing.Queue = queue) -> None:
                for step in self.steps[number::workers]:
                    length, copies = schedule[step]
                    queue.put(batch(seed, step, length, copies, chat, texts))

            process = context.Process(target=work, daemon=True)
            process.start()
            self.processes.append(process)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for place, step in enumerate(self.steps):
            yield step, self.queues[place % len(self.queues)].get()

    def close(self) -> None:
        """Stop the workers."""
        for process in self.processes:
            process.terminate()
