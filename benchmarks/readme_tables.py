"""Write the documents' tables from the CSVs in ``results/`` and the code: ``make readme-tables``.

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``. ``--check`` changes nothing and
fails where a document differs from them.
"""

import itertools
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks import roofline
from benchmarks.anchor_tables import anchors_table, pools_table
from benchmarks.plot_quality import summary
from benchmarks.rank_tables import rank_profile_table, ranks_table
from benchmarks.serving_profile import STEPS
from benchmarks.serving_workloads import WORKLOADS, compare, medians
from benchmarks.tables import (
    KERNELS,
    QUALITY,
    RESULTS,
    cells,
    laid_out,
    markdown,
    newest,
    newest_runs,
    read,
    rounded,
)
from kascade_sglang import settings
from kascade_sglang.evaluation.results import Results
from kascade_sglang.evaluation.show import BUDGET, means

ROOT = Path(__file__).resolve().parents[1]


def demo_table() -> str:
    """``make demo``: one column a backend."""
    runs = pd.read_csv(RESULTS / "demo.csv", dtype=str).set_index("backend")
    shown = runs.drop(columns=["commit", "versions", "date"])
    return laid_out(["--attention-backend"], shown.T, "{}")


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
    for row in answers().to_dict("records"):
        lengths = [key for key in row if isinstance(key, int)]
        points = cells((row[length] for length in lengths), "{:+.1f}")
        if not any(points) and pd.isna(row["hard"]):  # single tasks of a question of its own
            continue
        [hard] = cells([row["hard"]], f"{{:+.1f}} (n={row['n']:.0f})")
        lines.append([row["model"], row["config"], *points, hard, f"{row['prefill_read']:.0%}"])
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
    path, lines = RESULTS / results, {}
    runs, models = newest_runs(path), read(path)["model"].unique()
    for model, (name, workload) in itertools.product(models, WORKLOADS.items()):
        found = medians(runs[(runs["model"] == model) & (runs["workload"] == name)], workload)
        if "kascade" not in found or len(found) < 2 or not workload.must:
            continue
        best, ratio = compare(found, workload)
        ours, theirs = (rounded(found[key]) for key in ("kascade", best))
        figures = (ours, f"{theirs} ({best})", f"{ratio:.2f}x", f"{workload.must}x")
        lines[model, name] = [FIGURES[workload.figure], *figures]
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
    rows = newest(RESULTS / "quality_budgets.csv", QUALITY)
    rows = rows[(rows["model"] == "qwen2.5-coder-0.5b") & (rows["config"] != "dense")]
    table = rows.pivot_table(index="config", columns="length", values="diff", sort=False)
    return laid_out(["budget"], table, "{:+.1f}")


def by_length(name: str, index: list[str], figure: str, form: str) -> str:
    """A file of answers: means of a figure, a row a configuration, a column a length."""
    rows = newest(RESULTS / name, QUALITY)
    table = rows.pivot_table(index=index, columns="length", values=figure, sort=False)
    return laid_out(index, table, form)


def answers() -> pd.DataFrame:
    """``quality_models.csv``, a row a model and configuration."""
    return summary(newest(RESULTS / "quality_models.csv", QUALITY))


PRESETS = {
    "`fast`": ("fast", "fast", "fast"),
    "`balanced`, the default": ("default", "default", "default"),
    "`careful`": ("decode", None, "default"),
}
"""A preset's name in the rows of answers, and its modes in those of prefill and of decoding."""


def answers_table() -> str:
    """What each preset costs in answers, and its attention's speed: one row a preset."""
    table = answers().set_index(["config", "model"])
    models, lines = table.index.unique("model"), []
    for preset, (config, *modes) in PRESETS.items():
        points = table.reindex([(config, model) for model in models])
        scores = [
            ", ".join(filter(None, cells(row, "{:+.1f}")))
            for row in points[["mean", "hard"]].to_numpy()
        ]
        read = ", ".join(cells(points[["prefill_read", "decode_read"]].mean(), "{:.0%}"))
        speeds = (speeds_of(*case) for case in zip(SPEEDS, modes, SPEEDS.values(), strict=True))
        lines.append([preset, *scores, read, *speeds])
    header = ["preset", *(f"{model}: all tasks, hard tasks" for model in models)]
    shown = [f"{phase} of {', '.join(cases)}" for phase, cases in SPEEDS.items()]
    return markdown([*header, "keys read at 31K, prefill and decoding", *shown], lines)


SPEEDS = {"prefill": ("32K", "128K"), "decode": ("64x32K", "16x128K")}


def speeds_of(phase: str, mode: str | None, cases: Sequence[str]) -> str:
    """A mode's attention over FlashAttention-3's, shape of Llama-3.1-8B; None is dense."""
    if mode is None:
        return ", ".join("1.0x" for _ in cases)
    rows = newest(RESULTS / f"{phase}_h200.csv", KERNELS)
    rows = rows[(rows["plan"] == "llama-3.1-8b") & (rows["inputs"] == "random")]
    rows = rows[(rows["kind"] == "composite") & (rows["mode"] == mode)].set_index("case")
    return ", ".join(cells(rows["speedup"].loc[list(cases)], "{:.1f}x"))


def profile_table() -> str:
    """``bench_serving --profile``: where one decode step and one prefill go, in ms."""
    rows = read(RESULTS / "serving_profile_h100.csv")
    rows = rows[rows["workload"] == "rag-one-prefix"]
    stages = {"decode": "a decode step", "extend": "prefill"}
    steps = rows["stage"].map({"decode": STEPS, "extend": 1})
    rows = rows.assign(stage=rows["stage"].map(stages), ms=rows["ms"] / steps)
    columns = ["stage", "backend"]
    table = rows.pivot_table(index="kernel", columns=columns, values="ms", aggfunc="last")
    table = table[list(itertools.product(stages.values(), rows["backend"].unique()))]
    shares = rows.groupby("kernel", sort=False)["share"].max()
    shares = shares[shares >= LEAST_SHARE].sort_values(ascending=False, kind="stable")
    shown = table.loc[shares.index]
    shown.loc["all"] = table.sum()
    return laid_out([""], shown, "{:.2f}")


def kernel_table(name: str, modes: Sequence[str]) -> str:
    """Composites and shares of a kernel benchmark, one row a case.

    modes: the columns; layers' shares are those of the last but one, which every case has.
    """
    rows = newest(RESULTS / name, KERNELS)
    rows = rows[rows["inputs"] == "random"]
    plans = {"llama-3.1-8b": "Llama-3.1-8B", "qwen3-8b": "Qwen3-8B"}
    columns = list(itertools.product(plans, modes))
    composites = rows[rows["kind"] == "composite"]
    speeds = composites.pivot(index="case", columns=["plan", "mode"], values="speedup")
    layers = rows[(rows["plan"] == "") & (rows["mode"] == modes[-2])].set_index(["kind", "case"])
    lines = []
    for case in rows["case"].unique():
        shares = [layers.at[(kind, case), "share"] for kind in LAYERS]
        lines.append([case, *cells(speeds.reindex(columns=columns).loc[case], "{:.1f}x")])
        lines[-1] += [*cells(shares, "{:.2f}"), f"{layers.at[('reuse', case), 'fa3_ms']:.2f}"]
    header = [f"{plans[plan]}, {mode}" for plan, mode in columns]
    return markdown(["case", *header, *LAYERS.values(), "FA3, ms a layer"], lines)


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
    rows = read(RESULTS / "selection_mass.csv")
    rows = rows[(rows["phase"] == "prefill") & (rows["ratio"] == 0.1)]
    kept = rows.pivot_table(index="method", columns=["source", "length"], values="mean")
    return laid_out(["selection"], 1 - kept.loc[list(MASS_METHODS)].rename(MASS_METHODS), "{:.2%}")


def pieces_table() -> str:
    """``make bench-prefill``: an anchor layer's pieces as shares of FlashAttention-3."""
    rows = newest(RESULTS / "prefill_h100.csv", KERNELS)
    rows = rows[(rows["case"] == "8K-on-120K") & (rows["plan"] == "")]
    shares = rows.pivot(index="kind", columns=["mode", "inputs"], values="share")
    kinds = ["lse", "score", "select", "attend", "anchor", "layer0", "reuse"]
    columns = list(itertools.product(("fast", "exact"), ("random", "heavy_tailed")))
    return laid_out(["piece"], shares.loc[kinds, columns], "{:.3f}")


def decode_pieces_table() -> str:
    """``make bench-decode``: an anchor's pieces beside other libraries', as shares of FA3."""
    rows = newest(RESULTS / "decode_h100.csv", KERNELS)
    rows = rows[(rows["plan"] == "") & (rows["inputs"] == "random")]
    rows = rows[rows["kind"].isin(("score", "select", "attend"))]
    shares = rows.pivot_table(
        index=["kind", "method"], columns="case", values="share", aggfunc="last", sort=False
    )
    return laid_out(["piece", "library"], shares, "{:.3f}")


def ablations_table() -> str:
    """``ablations.py``: right answers by how anchors were chosen, and by the size of a tile."""
    rows = newest(RESULTS / "ablations_demo.csv", ("choice", "anchors", "tile"))
    lines = []
    for row in rows.sort_values("count", kind="stable").to_dict("records"):
        right, low, high = (f"{row[name]:.1%}" for name in ("accuracy", "low", "high"))
        answers = f"{right} of {row['n']} ({low} to {high})"
        plan = (row["choice"], str(row["count"]), row["anchors"], str(row["tile"]))
        lines.append([*plan, answers])
    header = ["anchors chosen by", "count", "layers", "tile", "right (95 %)"]
    return markdown(header, lines)


LEAST_SHARE = 0.01
"""Of a profile: kernels below it in every column are only in the sum."""
LAYERS = {"layer0": "layer 0 / FA3", "anchor": "anchor / FA3", "reuse": "reuse / FA3"}
"""Kinds of rows, and their columns' names."""
DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"speed": speed_table, "answers": answers_table},
    "docs/quickstart.md": {"demo": demo_table},
    "docs/choosing.md": {
        "settings": settings_table,
        "models": models_table,
        "budgets": budgets_table,
        "rivals": partial(by_length, "quality_rivals.csv", ["config"], "diff", "{:+.1f}"),
        "lessismore": partial(by_length, "quality_lessismore.csv", ["config"], "diff", "{:+.1f}"),
        "ttft": partial(by_length, "quality_ttft.csv", ["model", "config"], "ttft_ms", "{:.0f}"),
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
        "ranks": ranks_table,
        "rank-profile": rank_profile_table,
        "quality-tp": partial(by_length, "quality_tp.csv", ["config"], "diff", "{:+.1f}"),
        "anchors": anchors_table,
        "pools": pools_table,
        "ablations": ablations_table,
        "rules": rules_table,
    },
    "benchmarks/ROOFLINE.md": {
        "ceilings": roofline.ceilings_table,
        "decode-kernels": roofline.decode_kernels_table,
        "decode-layers": roofline.decode_layers_table,
        "prefill-layers": roofline.prefill_layers_table,
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
