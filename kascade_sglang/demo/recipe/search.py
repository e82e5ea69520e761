"""Choose the demo plan's anchors by what they do to the model's answers, one layer at a time.

``python -m kascade_sglang.demo.recipe.search --out search.csv [--anchors 5]``

The dynamic programme of ``kascade calibrate`` maximises recovered attention mass. On this small
model that misses the two layers whose few sharp heads look facts up. So the anchors are searched
directly: start from layer 0 and keep adding the layer that raises the log probability of the
right answers most, with the whole model running on Kascade attention. Names and values are the
training split's.
"""

import argparse
import csv
import random
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


def main() -> None:
    """Search greedily; write every set tried, with its score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--anchors", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    device = pick_device("auto")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().to(device)
    shape = shape_of(model.config)
    stats = collect(model, [ids for ids, _ in make_chats(tokenizer, 4, "statistics")], Budget())
    chats = make_chats(tokenizer, 6, "search")
    every = make_plan(shape, stats, tuple(range(shape.layers)))
    rows = [("dense", "all", *score(model, replace(every, budget=Budget(1.0)), chats))]
    rows.append(("oracle", "all", *score(model, every, chats)))
    chosen: tuple[int, ...] = (0,)
    while len(chosen) < options.anchors:
        tried = []
        for layer in sorted(set(range(shape.layers)) - set(chosen)):
            anchors = tuple(sorted((*chosen, layer)))
            tried.append((*score(model, make_plan(shape, stats, anchors), chats), anchors))
            rows.append(("greedy", " ".join(map(str, anchors)), *tried[-1][:2]))
        chosen = max(tried)[2]
        print(f"{len(chosen)} anchors: {chosen}, {max(tried)[:2]}", flush=True)
    with open(options.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "anchors", "answer_logprob", "answers_right"])
        writer.writerows((name, a, f"{lp:.6f}", f"{right:.4f}") for name, a, lp, right in rows)


if __name__ == "__main__":
    main()
