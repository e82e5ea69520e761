"""Choose the demo plan's anchors by what they do to the model's answers, one layer at a time.

``python -m kascade_sglang.demo.recipe.search --out search.csv [--anchors 6] [--start 0,4,5,8,9]``
``python -m kascade_sglang.demo.recipe.search --out sets.csv --sets 0,4,5,8,9 0,2,4,8,9,10``

The dynamic programme of ``kascade calibrate`` maximises recovered attention mass. On this small
model that misses the two layers whose few sharp heads look facts up. So the anchors are searched
directly: start from layer 0 and keep adding the layer that raises the log probability of the
right answers most, with the whole model running on Kascade attention. ``--sets`` scores given
sets instead, on chats that the search did not see. Names and values are the training split's.
"""

import argparse
import csv
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kascade_kernels.budget import Budget
from kascade_sglang.calibration.collect import LayerStats, collect
from kascade_sglang.calibration.hf_attention import KascadeAttention, our_attention
from kascade_sglang.calibration.hf_model import pick_device, shape_of
from kascade_sglang.demo.filler import load_filler
from kascade_sglang.demo.server import MODEL
from kascade_sglang.demo.tasks import TASKS, compose, prompt
from kascade_sglang.plan.schema import ModelShape, Plan

LENGTHS = (2048, 4096)
Layers = tuple[int, ...]
Row = tuple[Layers | str, float, float]
Chat = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the [begin, end) of every answer, its end token included."""


def make_chats(tokenizer: Any, count: int, tag: str) -> list[Chat]:
    """Make chats that ask about one document, with all answers given."""

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    def encode(chat: list[dict[str, str]], prompted: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=prompted, tokenize=True, return_dict=False
        )

    chats = []
    for index in range(count):
        rng = random.Random(f"{tag}-{index}")
        length = LENGTHS[index % len(LENGTHS)]
        draft = compose(rng, "train", dict.fromkeys(TASKS, 3), length, count_tokens, load_filler())
        chat, spans, ids = [], [], []
        for turn, item in enumerate(rng.sample(draft.items, len(draft.items))):
            text = item.question.text if turn else prompt("".join(draft.pieces), item.question.text)
            chat.append({"role": "user", "content": text})
            begin = len(encode(chat, True))
            chat.append({"role": "assistant", "content": item.reply})
            ids = encode(chat, False)
            end = begin + ids[begin:].index(tokenizer.eos_token_id) + 1
            spans.append((begin, end))
        chats.append((ids, spans))
    return chats


@torch.inference_mode()
def score(model: Any, plan: Plan, chats: list[Chat]) -> tuple[float, float]:
    """Mean log probability of answer tokens, and share of answers right as a whole."""
    total, tokens, right, answers = 0.0, 0, 0, 0
    with our_attention(model):
        for ids, spans in chats:
            row = torch.tensor([ids], device=model.device)
            logits = model(
                input_ids=row,
                past_key_values=DynamicCache(config=model.config),
                use_cache=True,
                kascade=KascadeAttention(plan),
            ).logits[0, :-1]
            logprobs = logits.float().log_softmax(-1)
            chosen = logprobs.gather(1, row[0, 1:, None])[:, 0]
            exact = logprobs.argmax(-1) == row[0, 1:]
            for begin, end in spans:
                total += float(chosen[begin - 1 : end - 1].sum())
                tokens += end - begin
                right += bool(exact[begin - 1 : end - 1].all())
                answers += 1
    return total / tokens, right / answers


def make_plan(shape: ModelShape, stats: LayerStats, anchors: tuple[int, ...]) -> Plan:
    """A plan with these anchors and the measured head similarities."""
    similarity = {}
    for layer in range(shape.layers):
        anchor = max(a for a in anchors if a <= layer)
        if anchor != layer:
            similarity[layer] = tuple(map(tuple, stats.similarity[anchor, layer].tolist()))
    return Plan("demo", shape, anchors, similarity)


def greedy(
    measure: Callable[[Layers], tuple[float, float]], start: Layers, layers: int, count: int
) -> list[Row]:
    """Add the layer that helps most until there are ``count`` anchors; returns every set tried."""
    rows: list[Row] = []
    chosen = start
    while len(chosen) < count:
        others = sorted(set(range(layers)) - set(chosen))
        sets = [tuple(sorted((*chosen, layer))) for layer in others]
        tried = [(anchors, *measure(anchors)) for anchors in sets]
        chosen = max(tried, key=lambda row: row[1])[0]
        print(f"{len(chosen)} anchors: {chosen}", flush=True)
        rows += tried
    return rows


def layers(text: str) -> Layers:
    """Parse ``0,4,8``."""
    return tuple(map(int, text.split(",")))


def main() -> None:
    """Search greedily, or score given sets; write every set with its score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--anchors", type=int, default=6)
    parser.add_argument("--start", type=layers, default=(0,), help="anchors to begin from")
    parser.add_argument("--sets", type=layers, nargs="+", help="score these sets, do not search")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    device = pick_device("auto")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().to(device)
    shape = shape_of(model.config)
    measured = [ids for ids, _ in make_chats(tokenizer, 8, "statistics")]
    stats = collect(model, measured, Budget(), criterion="mass")
    tag, count = ("validate", 12) if options.sets else ("search", 6)
    chats = make_chats(tokenizer, count, tag)

    def measure(anchors: Layers, budget: Budget | None = None) -> tuple[float, float]:
        plan = make_plan(shape, stats, anchors)
        return score(model, replace(plan, budget=budget or plan.budget), chats)

    every = tuple(range(shape.layers))
    rows: list[Row] = [("dense", *measure(every, Budget(1.0))), ("oracle", *measure(every))]
    if options.sets:
        rows += [(anchors, *measure(anchors)) for anchors in options.sets]
    else:
        rows += greedy(measure, options.start, shape.layers, options.anchors)
    answers = sum(len(spans) for _, spans in chats)
    with open(options.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["chats", "answers", "anchors", "answer_logprob", "answers_right"])
        for anchors, logprob, right in rows:
            name = anchors if isinstance(anchors, str) else " ".join(map(str, anchors))
            writer.writerow([tag, answers, name, f"{logprob:.6f}", f"{right:.4f}"])


if __name__ == "__main__":
    main()
