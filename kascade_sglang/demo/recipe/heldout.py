"""Accuracy on held-out documents: names, values and books that training never used.

A row holds one document, one question and the reference reply. Greedy decoding gives exactly
that reply when, at every place of it, the likeliest next token is the right one; that is what
is counted, so a reply in other words counts as wrong here.
"""

from __future__ import annotations

import csv
import multiprocessing
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kascade_sglang.demo.recipe.network import Network
from kascade_sglang.demo.recipe.rows import ANSWER, BATCH_TOKENS, Chat
from kascade_sglang.text.books import load_books
from kascade_sglang.text.documents import TASKS, compose

# The row length that a prompt of this length, with its reply, fits in.
ROW_LENGTHS = {1024: 1088, 2048: 2176, 4096: 4352, 8192: 8704}
QUESTIONS_A_DOCUMENT = 4

Cells = dict[tuple[str, int], np.ndarray]


def _document_rows(chat: Chat, seed: int, length: int) -> dict[str, list[np.ndarray]]:
    """The rows of one document, one for each question, by task."""
    rng = random.Random(f"heldout-{seed}-{length}")
    counts = dict.fromkeys(TASKS, QUESTIONS_A_DOCUMENT)
    # The prompt is the document, a question and the marks of the chat.
    draft = compose(rng, "test", counts, length - 40, chat.encoder.count, load_books())
    found: dict[str, list[np.ndarray]] = {task: [] for task in TASKS}
    for item in draft.items:
        found[item.question.task].append(chat.row(draft.pieces, [item], ROW_LENGTHS[length]))
    return found


def make_cells(chat: Chat, number: int, lengths: Sequence[int], workers: int) -> Cells:
    """``number`` rows for each (task, length): [row, ids or classes, place]."""
    jobs = [(chat, seed, n) for n in lengths for seed in range(number // QUESTIONS_A_DOCUMENT)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        made = pool.starmap(_document_rows, jobs)
    cells: dict[tuple[str, int], list[np.ndarray]] = {}
    for (_, _, length), found in zip(jobs, made, strict=True):
        for task, rows in found.items():
            cells.setdefault((task, length), []).extend(rows)
    return {key: np.stack(rows) for key, rows in cells.items()}


@torch.no_grad()
def accuracies(
    network: Network, weights: dict[str, Tensor], cells: Cells, number: int
) -> dict[tuple[str, int], float]:
    """The share of exactly right replies in each cell, over its first ``number`` rows."""
    device = weights["embed"].device
    result = {}
    for length in sorted({length for _, length in cells}):
        tasks = [task for task in TASKS if (task, length) in cells]
        rows = np.concatenate([cells[task, length][:number] for task in tasks])
        right: list[Tensor] = []
        size = BATCH_TOKENS // rows.shape[2]
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            # A full batch keeps the compiled shapes; the extra rows are cut off again.
            full = np.concatenate([part, np.repeat(rows[:1], size - len(part), 0)])
            ids = torch.from_numpy(full[:, 0].astype(np.int64)).to(device)
            kinds = torch.from_numpy(full[:, 1].astype(np.int64)).to(device).roll(-1, 1)
            _, hit = network(weights, ids)
            right.append((hit | (kinds != ANSWER)).all(1)[: len(part)])
        shares = torch.cat(right).float().view(len(tasks), -1).mean(1).tolist()
        result |= {(task, length): share for task, share in zip(tasks, shares, strict=True)}
    return result


def table(result: dict[tuple[str, int], float]) -> str:
    """The accuracies as lines of text, in percent."""
    lengths = sorted({length for _, length in result})
    lines = ["task            " + "".join(f"{length:>8}" for length in lengths)]
    for task in dict.fromkeys(task for task, _ in result):
        shares = "".join(f"{100 * result[task, length]:8.1f}" for length in lengths)
        lines.append(f"{task:16}{shares}")
    return "\n".join(lines)


def write_csv(path: Path, result: dict[tuple[str, int], float], number: int) -> None:
    """Write task, length, n, accuracy."""
    with path.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["task", "length", "n", "accuracy"])
        for (task, length), share in result.items():
            writer.writerow([task, length, number, f"{share:.4f}"])
