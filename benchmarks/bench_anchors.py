"""Which anchors, on a real model: what its answers lose, by how anchors were chosen.

Anchors are chosen on chats of ``kascade calibrate`` by divergence (``kl``) and by mass, evenly
spaced and drawn at random; ``all`` are all layers. Each set is then tried on other chats, with the
head maps of the first: ``decode_kl`` over prompts that were read densely, ``whole_kl`` where they
were read sparsely, too. Both are KL divergences of the next token, in nats, at positions where the
assistant speaks. No server; a GPU makes it fast.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from kascade_kernels.budget import Budget
from kascade_sglang.calibration import hf_model
from kascade_sglang.calibration.anchors import AnchorChoice
from kascade_sglang.calibration.answers import (
    Answers,
    Selecting,
    SparseAnswers,
    answering_rows,
    answers_of,
)
from kascade_sglang.calibration.build import build_plan, choices_by_mass
from kascade_sglang.calibration.collect import LayerStats, collect
from kascade_sglang.calibration.elimination import choose, run_densely
from kascade_sglang.calibration.hf_attention import KascadeAttention, our_attention
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.calibration.similarity import best_heads
from kascade_sglang.calibration.sources import PromptSource
from kascade_sglang.files import append_csv
from kascade_sglang.plan.schema import Plan
from kascade_sglang.provenance import gpu_provenance
from kascade_sglang.servers.process import run_command

RESULTS = Path(__file__).parent / "results/anchors.csv"
COLUMNS = """model chosen_by count anchors decode_kl whole_kl prompts tokens topk_ratio min_k
    gpu versions commit date""".split()
BUDGET = Budget(0.1, 128)
HELD_OUT = 1000
"""Seed of the chats that anchors are tried on."""


class Tried(NamedTuple):
    """Anchors, and how they were chosen."""

    chosen_by: str
    anchors: tuple[int, ...]


def candidates(
    choices: Sequence[AnchorChoice],
    stats: LayerStats,
    counts: Sequence[int],
    draws: int,
    named: dict[str, tuple[int, ...]],
) -> Iterator[Tried]:
    """Yield all that is compared. choices: by divergence. named: more anchors, by their name."""
    layers = stats.layers
    yield Tried("all", layers)
    for name, anchors in named.items():
        yield Tried(name, anchors)
    for count in counts:
        yield Tried("kl", next(one.anchors for one in choices if len(one.anchors) == count))
        yield Tried("mass", choices_by_mass(stats, "per_head", count)[0].anchors)
        places = [len(layers) * index // count for index in range(count)]
        yield Tried("even", tuple(layers[place] for place in places))
        for seed in range(draws):
            drawn = sorted(random.Random(seed).sample(layers[1:], count - 1))
            yield Tried("random", (layers[0], *drawn))


def whole_loss(model: PreTrainedModel, prompt: Prompt, answers: Answers, plan: Plan) -> float:
    """Loss at the rows of a prompt that is read under a plan, tile by tile, by the reference."""
    ids = hf_model.input_ids(model, prompt.ids)
    with torch.inference_mode(), our_attention(model):
        found = model(
            ids,
            use_cache=False,
            logits_to_keep=answers.rows,
            kascade=KascadeAttention(plan),
        ).logits[0]
    return answers.divergence(found)


class Subject(NamedTuple):
    """A model, what was measured of it on the first chats, and its dense answers to others."""

    model: PreTrainedModel
    first: Sequence[Prompt]
    held_out: Sequence[Prompt]
    stats: LayerStats
    how: Selecting
    answers: list[Answers]


def measure(options: argparse.Namespace) -> Subject:
    """Load a model, and measure it as ``kascade calibrate`` does."""
    path = options.model_path
    model = hf_model.load_model(path, "auto", hf_model.pick_device(options.device))
    tokenizer, context = hf_model.load_tokenizer(path), hf_model.context_length(model.config)
    first, held_out = (
        PromptSource(max_tokens=options.tokens, limit=options.prompts, seed=seed)
        .read(tokenizer, context)
        .prompts
        for seed in (0, HELD_OUT)
    )
    stats = collect(model, [prompt.ids for prompt in first], BUDGET)
    how = Selecting(stats.layers, torch.from_numpy(best_heads(stats.similarity)), BUDGET)
    answers = [answers_of(model, one, answering_rows(one, BUDGET)) for one in held_out]
    return Subject(model, first, held_out, stats, how, answers)


def stamp_of(options: argparse.Namespace, prompts: int) -> dict[str, object]:
    """Columns that every row of a run has alike. prompts: those tried on."""
    return {
        "model": hf_model.name_of(options.model_path),
        "prompts": prompts,
        "tokens": options.tokens,
        "topk_ratio": BUDGET.ratio,
        "min_k": BUDGET.min_k,
        **gpu_provenance(options.commit),
    }


def layers_of(text: str) -> tuple[int, ...]:
    """Read layers as ``0,3,9``."""
    return tuple(map(int, text.split(",")))


def add_common(add: Callable[..., object], out: Path) -> None:
    """Add the options of a benchmark that measures a model without a server."""
    add("--model-path", required=True, help="a folder or Hugging Face id")
    add("--prompts", type=int, default=10, help="to measure on, and as many to try on")
    add("--tokens", type=int, default=8192, help="of each")
    add("--device", default="auto", help="auto (the default), cpu or cuda")
    add("--out", type=Path, default=out)
    add("--commit", help="what to write as the commit, outside a repository")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench_anchors", description=__doc__)
    add = parser.add_argument
    add_common(add, RESULTS)
    add("--counts", type=int, nargs="+", default=[5, 8, 12], help="of anchors")
    add("--draws", type=int, default=2, help="random sets of each count")
    add("--also", nargs="*", default=[], metavar="NAME=0,2,8", help="more anchors to try")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Choose, try, and write rows as they come."""
    options = parse_arguments(argv)
    named = {}
    for text in options.also:
        name, _, layers = text.partition("=")
        named[name] = layers_of(layers)
    model, first, prompts, stats, how, answers = measure(options)
    choices = choose(run_densely(model, first, how), how.layers, 3)
    sparse = [SparseAnswers(one, how) for one in answers]
    shape, stamp = hf_model.shape_of(model.config), stamp_of(options, len(prompts))
    for tried in candidates(choices, stats, options.counts, options.draws, named):
        choice = AnchorChoice(tried.anchors, 0.0)
        plan = build_plan(stats, choice, [], options.model_path, shape, BUDGET, "per_head", {})
        decode = whole = 0.0
        for prompt, dense, one in zip(prompts, answers, sparse, strict=True):
            with one.loaded():
                decode += one.keep(tried.anchors) / len(prompts)
            whole += whole_loss(model, prompt, dense, plan) / len(prompts)
        row = {
            "chosen_by": tried.chosen_by,
            "count": len(tried.anchors),
            "anchors": " ".join(map(str, tried.anchors)),
            "decode_kl": f"{decode:.4g}",
            "whole_kl": f"{whole:.4g}",
        }
        append_csv(options.out, COLUMNS, [row | stamp])
        print(f"{tried.chosen_by} {row['anchors']}: {row['decode_kl']}, whole {row['whole_kl']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
