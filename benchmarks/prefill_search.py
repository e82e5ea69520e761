"""What rules of selection in prefill do to a real model's answers, offline and many at once.

RULER prompts are made for the model's tokenizer, the right reply is appended, and the model runs
once a (prompt, rule): the prompt's tiles attend by the rule, the reply's rows to everything. So
what is lost is prefill's. One row a (rule, task) goes to the CSV:

    kept          share of the prompts answered token by token, of those that dense attention does
    answered      share of all prompts answered so
    log_prob      mean log probability of a reply's tokens
    divergence    mean Kullback-Leibler divergence, in nats, of the reply's tokens from dense
    read          keys attended to in prefill, share of the causal ones
    recovered     mean mass that a row keeps; recovered_p01 the first percentile over rows

A layer's keys and queries stay on the device; nothing is approximated (``--kascade-exact``).
"""

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.prefill_rules import Rule, kept_keys, parse_rule
from kascade_sglang.calibration.hf_model import load_tokenizer
from kascade_sglang.evaluation.registry import groups, pick
from kascade_sglang.evaluation.samples import Order, Sample
from kascade_sglang.evaluation.tokens import Tokens
from kascade_sglang.files import append_csv
from kascade_sglang.plan.schema import Plan, load_plan
from kascade_sglang.provenance import provenance
from kascade_sglang.servers.process import run_command
from kascade_sglang.text.reading import UnreadableError, read_text

COLUMNS = """model rule task length n kept answered log_prob divergence read recovered recovered_p01
    seconds device versions commit date""".split()
BLOCK_BYTES = 1 << 29
"""Memory of one block's attention weights."""


@dataclass
class Run:
    """One forward pass: the rule, where the reply begins, and what the pass has seen.

    lists: {anchor: what it keeps, bool [H, tiles, keys]}. plan: whose anchors ``plan`` means.
    """

    rule: Rule
    prompt: int
    plan: Plan | None = None
    lists: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    read: float = 0.0
    seen: float = 0.0
    recovered: list[torch.Tensor] = field(default_factory=list)

    def source(self, layer: int) -> tuple[int, list[int] | None]:
        """Return the layer whose lists this layer attends to, and which of its heads' (all)."""
        if self.rule.plan:
            anchor = self.plan.anchor_of[layer]
            return anchor, None if anchor == layer else list(self.plan.head_map[layer])
        anchors = self.rule.anchors
        return (layer if anchors is None else max(a for a in anchors if a <= layer)), None


RUN: list[Run] = []
"""The pass in progress; transformers calls attention without room for an argument of ours."""


def attention(module, query, key, value, mask, scaling, **_unused):
    """Attend by the rule; query: [1, Hq, L, D], key and value: [1, H, L, D]."""
    run, layer = RUN[-1], module.layer_idx
    _, q_heads, length, dim = query.shape
    kv_heads, tile = key.shape[1], run.rule.tile
    group = q_heads // kv_heads
    q = query[0].view(kv_heads, group, length, dim)
    step = max(1, BLOCK_BYTES // (4 * q_heads * length * tile)) * tile
    out = torch.empty_like(q)
    for number, begin in enumerate(range(0, length, step)):
        end = min(begin + step, length)
        logits = torch.matmul(q[:, :, begin:end], key[0, :, None, :end].mT).float() * scaling
        rows = torch.arange(begin, end, device=q.device)
        later = torch.arange(end, device=q.device) > rows[:, None]
        weights = logits.masked_fill_(later, -torch.inf).softmax(-1)
        del logits
        if layer >= run.rule.dense and run.rule.ratio != 1.0:
            _drop(run, layer, number, weights, rows)
        out[:, :, begin:end] = torch.matmul(weights.to(value.dtype), value[0, :, None, :end])
    return out.view(1, q_heads, length, dim).transpose(1, 2), None


def _drop(run: Run, layer: int, number: int, weights: torch.Tensor, rows: torch.Tensor) -> None:
    """Set to zero what the rule leaves out, and scale the rest; in place."""
    kv_heads, group, count, keys = weights.shape
    rule, tile = run.rule, run.rule.tile
    short = -count % tile
    ends = torch.arange(int(rows[0]), int(rows[0]) + count, tile, device=rows.device)
    anchor, heads = run.source(layer)
    if anchor == layer:
        p = torch.nn.functional.pad(weights, (0, 0, 0, short))
        p = p.view(kv_heads, group, -1, tile, keys).transpose(1, 2).flatten(2, 3)
        p = p * (torch.arange(keys, device=rows.device) < ends[:, None, None])
        run.lists[layer].append(kept_keys(rule, p, ends))
    lists = run.lists[anchor][number] if heads is None else run.lists[anchor][number][heads]
    keep = lists.repeat_interleave(tile, dim=1)[:, :count]
    position = torch.arange(keys, device=rows.device)
    keep = keep | (position >= (rows // tile * tile)[:, None])
    keep = keep | (rows >= run.prompt - rule.tail)[:, None]
    weights *= keep[:, None]
    mass = weights.sum(-1, keepdim=True)
    weights /= mass
    asked = rows < run.prompt
    run.recovered.append(mass[:, :, asked].flatten().cpu())
    causal = position <= rows[:, None]
    run.read += float((keep & causal)[:, asked].sum()) / kv_heads
    run.seen += float(causal[asked].sum())


@dataclass(frozen=True)
class Case:
    """A prompt with its right reply. prompt: how many of the ids are the prompt's."""

    task: str
    ids: torch.Tensor
    prompt: int


def make_case(task: str, sample: Sample, tokenizer) -> Case:
    """Render a sample with the chat template and append the right reply."""
    message = [{"role": "user", "content": sample.prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer.encode(text + sample.prefix, add_special_tokens=False)
    reply = tokenizer.encode(" " + ", ".join(sample.answers), add_special_tokens=False)
    return Case(task, torch.tensor([prompt + reply]), len(prompt))


class Search:
    """A model and its cases; ``rows`` measures one rule over the cases of each task."""

    def __init__(self, options: argparse.Namespace) -> None:
        path, length = options.model_path, options.length
        tokenizer = load_tokenizer(str(path))
        ALL_ATTENTION_FUNCTIONS.register("kascade_rule", attention)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, attn_implementation="kascade_rule"
        )
        self.model = model.to(self.device).eval()
        stamp = provenance(options.commit)
        self.stamp = {name: value for name, value in stamp.items() if name in COLUMNS}
        self.plan = load_plan(options.plan) if options.plan else None
        order = Order(length, options.samples, options.seed, Tokens(tokenizer))
        self.cases = [
            make_case(task.name, sample, tokenizer)
            for task in pick(options.tasks.split(","), groups(None, None, None, None))
            for sample in task.make(order)
        ]
        self.length, self.name = length, path.name
        self.dense = [self.reply(case, parse_rule("dense"))[0] for case in self.cases]

    def reply(self, case: Case, rule: Rule) -> tuple[torch.Tensor, Run]:
        """Log probabilities of the reply's tokens, float32 [tokens, vocabulary]."""
        RUN[:] = [Run(rule, case.prompt, self.plan)]
        ids = case.ids.to(self.device)
        count = ids.shape[1] - case.prompt
        logits = self.model(ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
        return logits.float().log_softmax(-1).cpu(), RUN[-1]

    def rows(self, rule: Rule):
        """Yield one CSV row a task."""
        found = defaultdict(list)
        for case, dense in zip(self.cases, self.dense, strict=True):
            begin = time.monotonic()
            got, run = self.reply(case, rule)
            right = case.ids[0, case.prompt :]
            recovered = torch.cat(run.recovered) if run.recovered else torch.ones(1)
            low = recovered.kthvalue(max(1, len(recovered) // 100)).values
            found[case.task].append(
                {
                    "dense": float((dense.argmax(-1) == right).all()),
                    "answered": float((got.argmax(-1) == right).all()),
                    "log_prob": float(got.gather(1, right[:, None]).mean()),
                    "divergence": float((dense.exp() * (dense - got)).sum(-1).mean()),
                    "read": run.read / run.seen if run.seen else 1.0,
                    "recovered": float(recovered.mean()),
                    "recovered_p01": float(low),
                    "seconds": time.monotonic() - begin,
                }
            )
        for task, results in found.items():
            mean = {key: sum(r[key] for r in results) / len(results) for key in results[0]}
            both = sum(r["dense"] * r["answered"] for r in results)
            dense = sum(r["dense"] for r in results)
            mean = {key: f"{value:.4f}" for key, value in mean.items() if key in COLUMNS}
            kept = f"{both / dense:.4f}" if dense else ""
            about = {"model": self.name, "rule": rule.name, "task": task, "length": self.length}
            yield {**about, "n": len(results), "kept": kept, **mean, **self.stamp}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--plan", type=Path, help="whose anchors the part ``plan`` means")
    parser.add_argument("--rules", type=Path, required=True, help="a file, one rule a line")
    parser.add_argument("--tasks", default="niah_multikey_2,niah_multikey_3,niah_multivalue,vt")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=8, help="of each task")
    parser.add_argument("--commit", help="where this is no repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prefill_rules.csv"))
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure rule by rule; each rule's rows are written at once."""
    options = parse_arguments()
    try:
        rules = [parse_rule(line) for line in read_text(options.rules).split()]
    except UnreadableError as error:
        raise UnreadableError(f"--rules {options.rules}: cannot be read ({error})") from error
    search = Search(options)
    for rule in rules:
        rows = list(search.rows(rule))
        append_csv(options.out, COLUMNS, rows)
        shown = "kept answered log_prob divergence read recovered_p01 seconds".split()
        means = {key: sum(float(row[key] or 0) for row in rows) / len(rows) for key in shown}
        print(rule.name, *(f"{key} {value:.3f}" for key, value in means.items()), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
