"""Train the demo model on one GPU, in stages of growing length, and measure it.

Run as ``python -m kascade_sglang.demo.recipe.train --filler DIR/train.txt.gz --out OUT``. A
long training can be cut in parts: ``--until STEP`` ends one, ``--resume`` goes on from its
checkpoint. The same arguments give the same batches in the same order.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kascade_sglang.demo.recipe import heldout
from kascade_sglang.demo.recipe.encoding import Encoder
from kascade_sglang.demo.recipe.export import export
from kascade_sglang.demo.recipe.network import Network, Shape, Weights, new_weights
from kascade_sglang.demo.recipe.optimizer import Muon, adam_for_rest
from kascade_sglang.demo.recipe.rows import ANSWER, BATCH_TOKENS, REST, Chat, Feed
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.text.books import load_books


@dataclass(frozen=True)
class Stage:
    """Some steps; each takes one row length, drawn with these weights."""

    steps: int
    lengths: dict[int, float]
    copies: float = 0.0


STAGES = (
    Stage(300, {544: 1.0}, copies=0.15),
    Stage(500, {544: 0.6, 1088: 0.4}),
    Stage(1000, {544: 0.1, 1088: 0.6, 2176: 0.3}),
    Stage(1500, {1088: 0.2, 2176: 0.5, 4352: 0.3}),
    Stage(1500, {1088: 0.15, 2176: 0.25, 4352: 0.45, 8704: 0.15}),
    Stage(3500, {1088: 0.15, 2176: 0.15, 4352: 0.25, 8704: 0.45}),
)
MUON_LR, ADAM_LR, DECAY = 0.02, 0.003, 0.05
WARM_UP = 60
# The share of the steps, at the end, over which the learning rates fall to zero.
COOL_DOWN = 0.5
REST_WEIGHT = 0.1
LOG_EVERY = 10
CURVE_COLUMNS = ("step", "length", "loss", "answer_accuracy", "lr_factor", "tokens", "seconds")


def make_schedule(stages: Sequence[Stage], seed: int) -> list[tuple[int, float]]:
    """The row length and the share of copy rows of every step."""
    rng = random.Random(seed)
    schedule = []
    for stage in stages:
        drawn = rng.choices(list(stage.lengths), list(stage.lengths.values()), k=stage.steps)
        schedule += [(length, stage.copies) for length in drawn]
    return schedule


@dataclass
class Trainer:
    """The weights with their optimisers."""

    weights: Weights
    network: Network
    total: int

    def __post_init__(self) -> None:
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.muon = Muon(self.weights, DECAY)
        self.adam = adam_for_rest(self.weights)

    def rate(self, step: int, time_left: float) -> float:
        """The factor on the learning rates; ``time_left`` is a share, as a safeguard."""
        left = min(1 - step / self.total, time_left)
        return min(1.0, (step + 1) / WARM_UP, left / COOL_DOWN)

    def step(
        self, ids: Tensor, kinds: Tensor, step: int, rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One update; returns answer loss, other loss and answer accuracy as tensors."""
        losses, right = self.network(self.weights, ids)
        kinds = kinds.roll(-1, 1)
        kinds[:, -1] = 0
        answer, rest = (kinds == ANSWER).float(), (kinds == REST).float()
        answer_loss = (losses * answer).sum() / answer.sum()
        rest_loss = (losses * rest).sum() / rest.sum().clamp(min=1)
        (answer_loss + REST_WEIGHT * rest_loss).backward()
        self.muon.step(MUON_LR * rate, 0.85 + 0.1 * min(1.0, step / 300))
        self.adam.param_groups[0]["lr"] = ADAM_LR * rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        accuracy = (right * answer).sum() / answer.sum()
        return answer_loss.detach(), rest_loss.detach(), accuracy.detach()

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds, without the step."""
        return {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "muon": self.muon.momentum,
            "adam": self.adam.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
                if name in self.muon.momentum:
                    self.muon.momentum[name].copy_(state["muon"][name])
        self.adam.load_state_dict(state["adam"])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filler", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="where to write one (default: OUT)")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--until", type=int, help="stop after this many steps of the plan")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds of training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--check-every", type=int, default=500)
    parser.add_argument("--final-rows", type=int, default=400)
    return parser.parse_args()


def log_line(
    step: int, length: int, values: Sequence[float], rate: float, start: float
) -> list[int | str]:
    """One row of curves.csv, printed too now and then."""
    loss, rest, accuracy = values
    seconds = time.time() - start
    if step % 50 == 0:
        shown = f"{step:6} {length:5} {loss:.4f} {rest:.3f} {accuracy:.4f} {seconds:.1f}s"
        print(shown, flush=True)
    tokens = (step + 1) * BATCH_TOKENS
    return [step, length, f"{loss:.5f}", f"{accuracy:.5f}", f"{rate:.4f}", tokens, f"{seconds:.1f}"]


def train(
    trainer: Trainer,
    feed: Feed,
    lengths: Sequence[int],
    args: argparse.Namespace,
    spent: float,
    check: Callable[[int], None],
) -> tuple[int, float, list[list[int | str]]]:
    """Run the steps that ``feed`` yields, after ``spent`` seconds of earlier parts.

    Returns the next step, all seconds spent, and the rows of the curve.
    """
    began = time.time()
    device = trainer.weights["embed"].device
    finishes = args.until is None
    curve: list[list[int | str]] = []
    following = feed.steps.start
    for step, rows in feed:
        elapsed = (time.time() - began) / args.deadline
        if elapsed >= 1:
            break
        both = torch.from_numpy(rows.astype("int32")).to(device, non_blocking=True).long()
        rate = trainer.rate(step, 1 - elapsed if finishes else 1.0)
        values = trainer.step(both[0], both[1], step, rate)
        if step % LOG_EVERY == 0:
            found = [value.item() for value in values]
            curve.append(log_line(step, lengths[step], found, rate, began - spent))
        if step and step % args.check_every == 0:
            check(step)
        following = step + 1
    return following, spent + time.time() - began, curve


def main() -> None:
    """Train, write a checkpoint, the exported model, the curve and the accuracies."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    chat = Chat(Encoder(args.tokenizer))
    texts = load_books(args.filler)
    for _, sentences in (*texts, *load_books()):
        for sentence in sentences:
            chat.encoder.remember(" " + sentence)
    cells = heldout.make_cells(chat, args.final_rows, list(heldout.ROW_LENGTHS), args.workers)
    schedule = make_schedule(STAGES, args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = torch.load(args.resume, map_location="cpu") if args.resume else None
    first = state["step"] if state else 0
    feed = Feed(schedule[: args.until], first, args.seed, chat, texts, args.workers)
    shape = Shape()
    weights = {name: w.to(device) for name, w in new_weights(shape, args.seed).items()}
    network = Network(shape, compiled=device.type == "cuda")
    trainer = Trainer(weights, network, len(schedule))
    if state:
        trainer.load(state)

    def check(step: int) -> None:
        shares = heldout.accuracies(network, weights, cells, 32)
        print(f"held out after step {step}\n{heldout.table(shares)}", flush=True)

    spent = state["seconds"] if state else 0.0
    lengths = [length for length, _ in schedule]
    step, spent, curve = train(trainer, feed, lengths, args, spent, check)
    feed.close()
    checkpoint = args.checkpoint or args.out / "checkpoint.pt"
    torch.save({"step": step, "seconds": spent, **trainer.state()}, checkpoint)
    with (args.out / "curves.csv").open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(CURVE_COLUMNS)
        writer.writerows(curve)
    export(weights, shape, args.out / "model")
    print(f"stopped before step {step} of {len(schedule)}", flush=True)
    shares = heldout.accuracies(network, weights, cells, args.final_rows)
    heldout.write_csv(args.out / "accuracy.csv", shares, args.final_rows)
    print(heldout.table(shares))


if __name__ == "__main__":
    main()
