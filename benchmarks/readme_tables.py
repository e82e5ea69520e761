"""Write the documents' tables from the CSVs in ``results/`` and the code: ``make readme-tables``.

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``. ``--check`` changes nothing and
fails where a document differs from them.
"""

import csv
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks import plot_quality
from benchmarks.plot_kernels import newest
from benchmarks.plot_serving import newest_runs
from benchmarks.serving_profile import STEPS
from benchmarks.serving_workloads import WORKLOADS, compare, medians
from kascade_sglang import settings
from kascade_sglang.evaluation.results import Results
from kascade_sglang.evaluation.show import BUDGET, means

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Lay out one table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_table() -> str:
    """``make demo``: one column a backend."""
    with open(RESULTS / "demo.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    names = [name for name in runs[0] if name not in ("backend", "commit", "versions", "date")]
    rows = [[name, *(run[name] for run in runs)] for name in names]
    return markdown(["--attention-backend", *(run["backend"] for run in runs)], rows)


def quality_table() -> str:
    """``make eval``: share of right replies, one row a method, one column a budget."""
    found = means(Results(RESULTS / "quality_demo.csv").rows())
    cells = {label: f"{mean:.1f}% (n={count})" for label, (mean, count) in found.items()}
    split = {label: BUDGET.fullmatch(label) for label in cells}
    budgets = sorted({match[2] for match in split.values() if match}, key=float)
    methods = dict.fromkeys(match[1] if match else label for label, match in split.items())
    lines = [
        [name, *(cells.get(name) or cells.get(f"{name} {budget}%", "") for budget in budgets)]
        for name in methods
    ]
    return markdown(["method", *(f"{budget}%" for budget in budgets)], lines)


def models_table() -> str:
    """``make bench-quality``: points below or above dense attention, one row a configuration."""
    lines = []
    for row in plot_quality.summary(plot_quality.newest()).to_dict("records"):
        lengths = [key for key in row if isinstance(key, int)]
        points = [row[length] for length in lengths] + [row["hard"]]
        cells = ["" if math.isnan(value) else f"{value:+.1f}" for value in points]
        cells[-1] += f" (n={row['n']:.0f})"
        lines.append([row["model"], row["config"], *cells, f"{row['prefill_read']:.0%}"])
    header = [f"RULER at {length}" for length in lengths]
    hard = "two hard tasks, 16K and 31K"
    return markdown(["model", "config", *header, hard, "keys read in prefill at 31K"], lines)


def rules_table() -> str:
    """``prefill_search``: one row a rule and length, means over tasks, the least harmful first."""
    rows = pd.read_csv(RESULTS / "prefill_rules.csv")
    cells = rows.groupby(["length", "rule"], sort=False)
    means = cells[["divergence", "log_prob", "read", "recovered_p01"]].mean()
    means["n"] = cells["n"].sum()
    lines = [
        [
            str(length),
            f"`{rule}`",
            f"{row['divergence']:.3f}",
            f"{row['log_prob']:.3f}",
            f"{row['read']:.0%}",
            f"{row['recovered_p01']:.2f}",
            f"{row['n']:.0f}",
        ]
        for (length, rule), row in means.sort_values(["length", "divergence"]).iterrows()
    ]
    header = ["tokens", "rule", "divergence, nats", "log probability", "keys read"]
    return markdown([*header, "mass kept, 1st percentile of rows", "prompts"], lines)


def prefill_table() -> str:
    """``make bench-prefill``: speed over FlashAttention-3, one row a case; random inputs."""
    return kernel_table("prefill_h100.csv", ("min_k_4096", "fast", "exact"))


def decode_table() -> str:
    """``make bench-decode``: speed over FlashAttention-3, one row a case; random inputs."""
    return kernel_table("decode_h100.csv", ("fast", "exact"))


def settings_table() -> str:
    """What ``kascade_sglang.settings`` declares."""
    header, *rows = settings.table()
    return markdown(header, rows)


FIGURES = {
    "itl_p50_ms": "time between tokens, ms, median",
    "ttft_p50_ms": "time to the first token, ms",
    "ttft_p99_ms": "time to the first token, ms, p99",
    "output_tokens_per_s": "tokens out a second",
}


def serving_lines(results: str) -> dict[tuple[str, str], list[str]]:
    """Return the cells of workloads with a target, by (server, workload).

    Of each backend, the median of the newest commit's rows.
    """
    runs, lines = newest_runs(RESULTS / results), {}
    for model, (name, workload) in itertools.product(
        dict.fromkeys(key[0] for key in runs), WORKLOADS.items()
    ):
        rows = (row for key in runs if key[:2] == (model, name) for row in runs[key])
        found = medians(rows, workload)
        if "kascade" not in found or len(found) < 2 or not workload.must:
            continue
        best, ratio = compare(found, workload)
        ours, theirs = (
            f"{found[key]:,.{0 if found[key] >= 100 else 1}f}" for key in ("kascade", best)
        )
        cells = (ours, f"{theirs} ({best})", f"{ratio:.2f}x", f"{workload.must}x")
        lines[model, name] = [FIGURES[workload.figure], *cells]
    return lines


def serving_table(results: str = "serving_h100.csv") -> str:
    """``make bench-serving``: Kascade against the best of SGLang's backends, all workloads."""
    lines = [[", ".join(key), *cells] for key, cells in serving_lines(results).items()]
    header = ["server and workload", "figure", "kascade", "best of SGLang's", "better by", "target"]
    return markdown(header, lines)


SHORT = {
    "decode-8x32K": "decoding, 8 requests of 32K tokens",
    "decode-3x128K": "decoding, 3 requests of 128K",
    "prefill-32K": "a prompt of 32K",
    "prefill-128K": "a prompt of 128K",
    "rag-8-prefixes-limit": "questions on 8 long documents",
    "chat": "short chats",
}
"""Workloads that a first look needs, in plain words."""


def speed_table() -> str:
    """``make bench-serving``: a few workloads of one server."""
    found = serving_lines("serving_h100.csv")
    lines = [[text, *found["llama-3.1-8b", name][:-1]] for name, text in SHORT.items()]
    return markdown(["workload", "figure", "kascade", "best of SGLang's", "better by"], lines)


def budgets_table() -> str:
    """``quality_budgets.csv``: decoding with dense prefill, points by length, a row a budget."""
    rows = plot_quality.newest(RESULTS / "quality_budgets.csv")
    rows = rows[(rows["model"] == "qwen2.5-coder-0.5b") & (rows["config"] != "dense")]
    table = rows.pivot_table(index="config", columns="length", values="diff", sort=False)
    lines = [[name, *(f"{value:+.1f}" for value in row)] for name, row in table.iterrows()]
    return markdown(["budget", *map(str, table.columns)], lines)


def answers_table() -> str:
    """``make bench-quality``: the longest prompts of each model, a row a preset."""
    lines = []
    table = plot_quality.summary(plot_quality.newest())
    for row in table[table["config"].isin(("default", "decode", "fast"))].to_dict("records"):
        hard = f"{row['hard']:+.1f} (n={row['n']:.0f})"
        lines.append([row["model"], row["config"], hard, f"{row['prefill_read']:.0%}"])
    header = ["model", "setting", "two hard tasks, 16K and 31K", "keys read in prefill at 31K"]
    return markdown(header, lines)


def profile_table() -> str:
    """``bench_serving --profile``: where one decode step and one prefill go, in ms."""
    with open(RESULTS / "serving_profile_h100.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["workload"] == "rag-one-prefix"]
    steps = {"decode": STEPS, "extend": 1}
    found = {
        (r["stage"], r["backend"], r["kernel"]): float(r["ms"]) / steps[r["stage"]] for r in rows
    }
    backends = dict.fromkeys(row["backend"] for row in rows)
    kinds = dict.fromkeys(row["kernel"] for row in rows)
    shares = {kind: max(float(r["share"]) for r in rows if r["kernel"] == kind) for kind in kinds}
    columns = list(itertools.product(steps, backends))
    lines = []
    for kind in sorted(kinds, key=lambda kind: -shares[kind]):
        values = [found.get((*column, kind)) for column in columns]
        if shares[kind] >= LEAST_SHARE:
            lines.append([kind, *("" if ms is None else f"{ms:.2f}" for ms in values)])
    sums = [sum(ms for (*of, _), ms in found.items() if tuple(of) == one) for one in columns]
    lines.append(["all", *(f"{ms:.2f}" for ms in sums)])
    names = {"decode": "a decode step", "extend": "prefill"}
    return markdown(["", *(f"{names[stage]}, {backend}" for stage, backend in columns)], lines)


def kernel_table(name: str, modes: Sequence[str]) -> str:
    """Composites and shares of a kernel benchmark, one row a case.

    modes: the columns; layers' shares are those of the last but one, which every case has.
    """
    rows = [row for row in newest(RESULTS / name) if row["inputs"] == "random"]
    found = {(r["case"], r["kind"], r["plan"], r["mode"]): r for r in rows}
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        composites = [
            found.get((case, "composite", plan, mode))
            for plan in ("llama-3.1-8b", "qwen3-8b")
            for mode in modes
        ]
        speeds = [f"{float(row['speedup']):.1f}x" if row else "" for row in composites]
        layers = [found[case, kind, "", modes[-2]] for kind in ("layer0", "anchor", "reuse")]
        shares = [f"{float(row['share']):.2f}" for row in layers]
        lines.append([case, *speeds, *shares, f"{float(layers[-1]['fa3_ms']):.2f}"])
    plans = [f"{plan}, {mode}" for plan in ("Llama-3.1-8B", "Qwen3-8B") for mode in modes]
    shares = [f"{kind} / FA3" for kind in ("layer 0", "anchor", "reuse")]
    return markdown(["case", *plans, *shares, "FA3, ms a layer"], lines)


MASS_METHODS = {
    "int8_kq": "keys and queries in 8 bits (int8), exact LSE",
    "fp8_kq": "keys and queries in 8 bits (fp8), exact LSE",
    "int4_k": "keys in 4 bits, exact LSE",
    "fp32_lse4": "LSE from every 4th key, exact keys",
    "int8_kq_lse4": "**the default: int8, LSE from every 4th key**",
    "int8_kq_lse8": "int8, LSE from every 8th key",
    "int8_kq_lse16": "int8, LSE from every 16th key",
    "int8_kq_lse16_refine2": "int8, LSE from every 16th key; twice as many, scored again exactly",
    "queries_2": "every second query of a tile",
    "queries_4": "every fourth query of a tile",
    "pages16_x4": "bounds of pages of 16 keys; four times as many, scored exactly",
}


def mass_table() -> str:
    """``selection_mass.py``: mean loss of mass in prefill at a ratio of 0.1, one row a method."""
    with open(RESULTS / "selection_mass.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["phase"], r["ratio"]) == ("prefill", "0.1")]
    found = {(r["method"], r["source"], r["length"]): r for r in rows}
    inputs = sorted({key[1:] for key in found}, key=lambda one: (one[0], int(one[1])))
    lines = [
        [text, *(f"{1 - float(found[(method, *one)]['mean']):.2%}" for one in inputs)]
        for method, text in MASS_METHODS.items()
    ]
    return markdown(["selection", *(f"{source}, {length}" for source, length in inputs)], lines)


def pieces_table() -> str:
    """``make bench-prefill``: an anchor layer's pieces as shares of FlashAttention-3."""
    rows = [r for r in newest(RESULTS / "prefill_h100.csv") if r["case"] == "8K-on-120K"]
    found = {(r["kind"], r["mode"], r["inputs"]): r for r in rows if not r["plan"]}
    columns = [(mode, inputs) for mode in ("fast", "exact") for inputs in INPUTS]
    kinds = ("lse", "score", "select", "attend", "anchor", "layer0", "reuse")
    lines = [
        [kind, *(f"{float(found[(kind, *column)]['share']):.3f}" for column in columns)]
        for kind in kinds
    ]
    return markdown(["piece", *(", ".join(column) for column in columns)], lines)


def decode_pieces_table() -> str:
    """``make bench-decode``: an anchor's pieces beside other libraries', as shares of FA3."""
    rows = [row for row in newest(RESULTS / "decode_h100.csv") if not row["plan"]]
    found = {(r["kind"], r["method"], r["case"]): r for r in rows if r["inputs"] == "random"}
    cases = [case for kind, _, case in found if kind == "score"]
    pieces = dict.fromkeys(key[:2] for key in found if key[0] in ("score", "select", "attend"))
    lines = [
        [kind, method, *(f"{float(found[kind, method, case]['share']):.3f}" for case in cases)]
        for kind, method in pieces
    ]
    return markdown(["piece", "library", *cases], lines)


def ablations_table() -> str:
    """``ablations.py``: right answers by how anchors were chosen, and by the size of a tile."""
    with open(RESULTS / "ablations_demo.csv", newline="") as file:
        names = ("choice", "anchors", "tile")
        latest = {tuple(row[name] for name in names): row for row in csv.DictReader(file)}
    rows = list(latest.values())
    rows.sort(key=lambda row: int(row["count"]))  # Stable: as measured, within a count.
    lines = []
    for row in rows:
        right, low, high = (f"{float(row[name]):.1%}" for name in ("accuracy", "low", "high"))
        answers = f"{right} of {row['n']} ({low} to {high})"
        cells = (row["count"], row["anchors"], row["tile"], answers)
        lines.append([row["choice"], *cells])
    header = ["anchors chosen by", "count", "layers", "tile", "right (95 %)"]
    return markdown(header, lines)


LEAST_SHARE = 0.01
"""Of a profile: kernels below it in every column are only in the sum."""
INPUTS = ("random", "heavy_tailed")
DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"speed": speed_table, "answers": answers_table},
    "docs/quickstart.md": {"demo": demo_table},
    "docs/choosing.md": {
        "settings": settings_table,
        "models": models_table,
        "budgets": budgets_table,
    },
    "docs/benchmarks.md": {
        "quality": quality_table,
        "prefill": prefill_table,
        "decode": decode_table,
        "prefill-h200": partial(kernel_table, "prefill_h200.csv", ("default", "fast", "exact")),
        "decode-h200": partial(kernel_table, "decode_h200.csv", ("default", "fast", "exact")),
        "serving": serving_table,
    },
    "benchmarks/README.md": {
        "decode-pieces": decode_pieces_table,
        "serving-h200": partial(serving_table, "serving_h200.csv"),
        "profile": profile_table,
        "ablations": ablations_table,
        "rules": rules_table,
    },
    "benchmarks/results/faster_selection.md": {"mass": mass_table, "pieces": pieces_table},
}


def main() -> int:
    """Fill the documents in, or check them."""
    changed = False
    for name, tables in DOCUMENTS.items():
        path = ROOT / name
        before = text = path.read_text()
        for mark, table in tables.items():
            pattern = re.compile(f"(<!-- {mark} -->\n).*?(<!-- end {mark} -->)", re.S)
            filled = table()
            text, found = pattern.subn(lambda match, t=filled: f"{match[1]}{t}\n{match[2]}", text)
            if found != 1:
                sys.exit(f"{name}: expected one table between <!-- {mark} --> marks, got {found}")
        changed |= text != before
        if "--check" not in sys.argv:
            path.write_text(text)
    return 1 if changed and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
