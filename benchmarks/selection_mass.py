"""Attention mass that approximate selections recover, relative to the exact selection.

A *row* is what one KV head selects for: the queries of a tile (one in decoding) times the query
heads of the group. Every method selects ``Budget.selected`` keys, the own tile comes on top, and
the true float64 mass on both is compared with that of the exact selection. ``attention_inputs``
makes K and q.

Columns: ``mean`` and ``worst`` of a row's mass over the exact selection's; ``query_*`` the same
for the single queries in the rows (first percentile: ``p01``); ``recovered``, the mean share of
all mass that the selection and the own tile hold.
"""

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.attention_inputs import Case, Sizes, demo, synthetic
from benchmarks.tables import read
from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.codes import encode
from kascade_kernels.reference import select_topk
from kascade_sglang.plan.schema import load_plan
from kascade_sglang.provenance import provenance
from kascade_sglang.servers.demo_model import MODEL

COLUMNS = """source length phase ratio method mean worst query_mean query_p01 query_worst
    recovered n device commit date versions""".split()
RATIOS = (0.05, 0.1)
EDGE = 128
"""Keys at either end of the candidates that a sampled LSE takes exactly."""
BLOCK = 128
"""Keys that share one maximum where logits are stored in half precision."""
STEPS = (4, 8, 16, 32, 64)


@dataclass
class Row:
    """The queries that read one KV head in one tile, and the keys they see.

    q: [R, D] float32, R = group * n, query head major. k: [L, D] float32, up to the last query's.
    """

    q: torch.Tensor
    k: torch.Tensor
    n: int
    scale: float
    cache: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def own(self) -> int:
        """First position of the own tile: the number of candidates."""
        return TILE * tile_of(len(self.k) - 1)

    @cached_property
    def mass(self) -> torch.Tensor:
        """True attention, float64 [R, L]."""
        logits = self.q.double() @ self.k.double().T * self.scale
        return torch.softmax(self.masked(logits), dim=-1)

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the keys after each query, in [R, L], to -inf; in place."""
        query = torch.arange(self.n).repeat(len(self.q) // self.n).unsqueeze(1)
        later = torch.arange(self.own, len(self.k)) > query + len(self.k) - self.n
        logits[:, self.own :].masked_fill_(later, -math.inf)
        return logits

    def logits(self, kind: str = "fp32") -> torch.Tensor:
        """Masked float32 logits [R, L] by a named arithmetic; do not write into them."""
        if kind not in self.cache:
            self.cache[kind] = self.masked(ARITHMETIC[kind](self))
        return self.cache[kind]


def rows_of(case: Case) -> Iterator[Row]:
    """Cut a case into one row a KV head."""
    n, q_heads, dim = case.q.shape
    kv_heads = case.k.shape[1]
    grouped = case.q.float().reshape(n, kv_heads, q_heads // kv_heads, dim)
    for head in range(kv_heads):
        q = grouped[:, head].transpose(0, 1).reshape(-1, dim)
        yield Row(q, case.k[:, head].float(), n, case.scale)


def round_int(x: torch.Tensor, most: int) -> torch.Tensor:
    """Round to whole multiples of each row's largest magnitude / most."""
    step = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / most
    return (x / step).round_() * step


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """Round to float8 e4m3 without a scale; beyond 448 saturates."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, a power of two."""
    for bit in range(x.shape[-1].bit_length() - 1):
        pairs = x.unflatten(-1, (-1, 2, 1 << bit))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]])
        x = x.movedim(0, -2).flatten(-3)
    return x / math.sqrt(x.shape[-1])


def half_by_block(logits: torch.Tensor) -> torch.Tensor:
    """Round to float16 relative to the maximum of each BLOCK keys."""
    blocks = torch.nn.functional.pad(logits, (0, -logits.shape[1] % BLOCK), value=-math.inf)
    blocks = blocks.unflatten(1, (-1, BLOCK))
    most = blocks.amax(dim=-1, keepdim=True)
    return ((blocks - most).half().float() + most).flatten(1)[:, : logits.shape[1]]


def _product(row: Row, on_q: Callable, on_k: Callable) -> torch.Tensor:
    return on_q(row.q) @ on_k(row.k).T * row.scale


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


_int8, _int4 = partial(round_int, most=127), partial(round_int, most=7)
ARITHMETIC: dict[str, Callable[[Row], torch.Tensor]] = {
    "fp32": lambda row: _product(row, _same, _same),
    "fp16_block": lambda row: half_by_block(row.logits()),
    "bf16": lambda row: row.logits().bfloat16().float(),
    "int8_k": lambda row: _product(row, _same, _int8),
    "int8_kq": lambda row: _product(row, _int8, _int8),
    "int8_kq_rotated": lambda row: _product(
        row, lambda q: _int8(hadamard(q)), lambda k: _int8(hadamard(k))
    ),
    "fp8_k": lambda row: _product(row, _same, round_fp8),
    "fp8_kq": lambda row: _product(row, round_fp8, round_fp8),
    "int4_k": lambda row: _product(row, _same, _int4),
}
"""Ways to compute logits. int8 and int4 have one scale a (token, head) and, for q, one a row."""

Score = Callable[[Row, int], torch.Tensor]
"""(row, keys to select) -> scores of the candidates, [1, C]."""


def full(row: Row, count: int, kind: str, code: bool = False) -> torch.Tensor:
    """Post-softmax scores, with every query's exact LSE under that arithmetic."""
    scores = torch.softmax(row.logits(kind), dim=-1)[:, : row.own].sum(0, keepdim=True)
    return encode(scores) if code else scores


def sampled(row: Row, count: int, kind: str, step: int, code: bool = False) -> torch.Tensor:
    """Scores with the LSE estimated from both edges, the own tile and every step-th other key.

    Such a share may pass 1; that changes no selection, as a key with a share of 1 is selected.
    """
    logits = row.logits(kind)
    exact = torch.ones(len(row.k), dtype=torch.bool)
    exact[EDGE : max(EDGE, row.own - EDGE)] = False
    lse = logits[:, exact].logsumexp(-1)
    if row.own > 2 * EDGE:
        middle = logits[:, EDGE : row.own - EDGE : step]
        weight = math.log((row.own - 2 * EDGE) / middle.shape[1])
        lse = torch.logaddexp(lse, middle.logsumexp(-1) + weight)
    shares = (logits[:, : row.own] - lse.unsqueeze(1)).clamp_(max=80.0).exp_()
    scores = shares.sum(0, keepdim=True)
    return encode(scores) if code else scores


def some_queries(row: Row, count: int, step: int) -> torch.Tensor:
    """Exact scores of every step-th query of the tile, the last one included."""
    query = torch.arange(len(row.q)) % row.n
    logits = row.logits()[(row.n - 1 - query) % step == 0]
    return torch.softmax(logits, dim=-1)[:, : row.own].sum(0, keepdim=True)


def pages(row: Row, count: int, page: int, times: int) -> torch.Tensor:
    """Keep ``times * count`` keys in the pages of the greatest bounds, exact scores in those.

    A page's bound for a query is Quest's, from the least and greatest K of each channel; a tile
    pools the bounds' softmax. The LSE in the second step is that of kept keys and own tile.
    """
    paged = row.k[: row.own].unflatten(0, (-1, page))
    low, high = paged.amin(1), paged.amax(1)
    bound = (row.q.clamp(min=0) @ high.T + row.q.clamp(max=0) @ low.T) * row.scale
    own = row.logits()[:, row.own :]
    weight = torch.softmax(torch.cat([bound, own], 1), -1)[:, : len(low)].sum(0, keepdim=True)
    kept = select_topk(weight, min(len(low), math.ceil(times * count / page)))[0]
    keys = (kept.unsqueeze(1) * page + torch.arange(page)).flatten()
    inside = torch.softmax(torch.cat([row.logits()[:, keys], own], 1), -1)[:, : len(keys)]
    scores = torch.full((1, row.own), -1.0)
    scores[0, keys] = inside.sum(0)
    return scores


def refined(row: Row, count: int, first: Score, kind: str, times: float) -> torch.Tensor:
    """Score the ``times * count`` best keys of another method again, exactly.

    The LSE is that of all keys in the first method's arithmetic: its pass has seen every logit.
    """
    keys = select_topk(first(row, count), min(row.own, math.ceil(times * count)))[0]
    lse = row.logits(kind).logsumexp(-1, keepdim=True)
    scores = torch.full((1, row.own), -1.0)
    scores[0, keys] = (row.logits()[:, keys] - lse).exp().sum(0)
    return scores


def methods(phase: str) -> dict[str, partial[torch.Tensor]]:
    """Return the approximate methods of ``decode`` or ``prefill`` by name."""
    found = {kind: partial(full, kind=kind) for kind in ARITHMETIC}
    found["int8_k_code"] = partial(full, kind="int8_k", code=True)
    for page, times in product((16, 32), (2, 4)):
        found[f"pages{page}_x{times}"] = partial(pages, page=page, times=times)
    for times in (1.5, 2):
        found[f"int8_kq_refine{times}"] = partial(
            refined, first=partial(full, kind="int8_kq"), kind="int8_kq", times=times
        )
    if phase == "decode":
        return found
    for kind, step in product(("fp32", "int8_kq", "fp8_kq"), STEPS):
        found[f"{kind}_lse{step}"] = partial(sampled, kind=kind, step=step)
    found["int8_kq_lse16_code"] = partial(sampled, kind="int8_kq", step=16, code=True)
    for kind, step in product(("fp32", "int8_kq"), (16, 64)):
        for times in (1.5, 2):
            first = partial(sampled, kind=kind, step=step)
            name = f"{kind}_lse{step}_refine{times}"
            found[name] = partial(refined, first=first, kind=kind, times=times)
    for step in (2, 4):
        found[f"queries_{step}"] = partial(some_queries, step=step)
    return found


class Tally:
    """What one method recovered, over the rows of a source, length, phase and ratio."""

    def __init__(self) -> None:
        self.rows: list[float] = []
        self.queries: list[torch.Tensor] = []
        self.recovered: list[float] = []

    def add(self, found: torch.Tensor, exact: torch.Tensor) -> None:
        """Add one row: mass of each query, float64 [R], by the method and by exact selection."""
        self.rows.append(float(found.sum() / exact.sum()))
        self.queries.append(found / exact)
        self.recovered.append(float(found.mean()))

    def summary(self) -> dict[str, Any]:
        """Return the CSV's numbers."""
        rows, queries = torch.tensor(self.rows), torch.cat(self.queries)
        low = queries.kthvalue(max(1, math.ceil(0.01 * len(queries)))).values
        numbers = {"mean": rows.mean(), "worst": rows.min(), "query_mean": queries.mean()}
        numbers |= {"query_p01": low, "query_worst": queries.min()}
        numbers["recovered"] = torch.tensor(self.recovered).mean()
        return {name: f"{float(x):.5f}" for name, x in numbers.items()} | {"n": len(rows)}


def kept_mass(row: Row, scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mass of every query on the own tile and the ``count`` keys of the best scores, [R]."""
    keys = select_topk(scores, count)[0]
    return row.mass[:, keys].sum(1) + row.mass[:, row.own :].sum(1)


def measure(row: Row, phase: str, tallies: dict[tuple[float, str], Tally]) -> None:
    """Run every method on one row at every ratio."""
    truth = row.mass[:, : row.own].sum(0, keepdim=True)
    counts = {ratio: Budget(ratio).selected(tile_of(len(row.k) - 1)) for ratio in RATIOS}
    exact = {ratio: kept_mass(row, truth, count) for ratio, count in counts.items()}
    for ratio in RATIOS:
        tallies.setdefault((ratio, "exact"), Tally()).add(exact[ratio], exact[ratio])
    for name, score in methods(phase).items():
        scores = None
        for ratio, count in counts.items():
            if scores is None or score.func in (pages, refined):  # These score by budget.
                scores = score(row, count)
            found = kept_mass(row, scores, count)
            tallies.setdefault((ratio, name), Tally()).add(found, exact[ratio])


def plot(path: Path, picture: Path) -> None:
    """Draw the loss of every method, mean and first percentile of queries, by phase and ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(path)
    rows = rows[~rows["method"].isin(("exact", "fp32"))]
    figure, grid = pyplot.subplots(1, 4, figsize=(17, 11), layout="constrained")
    panels = product(("decode", "prefill"), RATIOS)
    for axes, (phase, ratio) in zip(grid, panels, strict=True):
        mine = rows[(rows["phase"] == phase) & (rows["ratio"] == ratio)]
        sources = mine.groupby(["source", "length"], sort=False)
        for color, ((source, length), part) in enumerate(sources):
            for column, mark in (("mean", "o"), ("query_p01", "|")):
                loss = (1 - part[column]).clip(lower=1e-5)
                label = f"{source} {length}, {column}"
                axes.plot(loss, part["method"], mark, color=f"C{color}", label=label, alpha=0.8)
        axes.axvline(0.005, color="black", linestyle="--")
        axes.set(xscale="log", xlabel="mass lost", title=f"{phase}, ratio {ratio}")
        axes.invert_yaxis()
    grid[0].legend(fontsize=7)
    figure.savefig(picture, dpi=100)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=int, nargs="*", default=[4096, 8192], help="lengths")
    parser.add_argument("--synthetic", type=int, nargs="*", default=[8192, 32768], help="lengths")
    parser.add_argument("--tiles", type=int, default=24, help="per layer and sample")
    parser.add_argument("--positions", type=int, default=32, help="decode steps, per sample")
    parser.add_argument("--samples", type=int, default=3, help="documents, or synthetic layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection_mass.csv"))
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure, write the CSV length by length, and draw it."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    stamp = {name: value for name, value in provenance().items() if name in COLUMNS}
    sizes = Sizes(options.tiles, options.positions, options.samples)
    work = [("demo", demo, n) for n in options.demo]
    work += [("synthetic", synthetic, n) for n in options.synthetic]
    plan = load_plan(MODEL / "kascade_plan.json")
    layers_and_heads = len(options.demo) * len(plan.anchors) * plan.shape.kv_heads
    layers_and_heads += len(options.synthetic) * 2
    total = layers_and_heads * sizes.samples * (sizes.tiles + sizes.positions)
    with open(options.out, "w", newline="") as file, tqdm(total=total, unit="row") as bar:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for source, make, length in work:
            bar.set_description(f"{source} {length}")
            tallies: dict[str, dict[tuple[float, str], Tally]] = {"decode": {}, "prefill": {}}
            for case in make(length, sizes):
                for row in rows_of(case):
                    measure(row, case.phase, tallies[case.phase])
                    bar.update()
            for phase, found in tallies.items():
                for (ratio, method), tally in sorted(found.items(), key=lambda item: item[0][0]):
                    row = {"source": source, "length": length, "phase": phase, "ratio": ratio}
                    writer.writerow({**row, "method": method, **tally.summary(), **stamp})
            file.flush()
    plot(options.out, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
