"""The documents' tables of servers on several GPUs."""

import itertools

import pandas as pd

from benchmarks.serving_profile import STEPS
from benchmarks.serving_workloads import WORKLOADS, compare, medians
from benchmarks.tables import RESULTS, SERVING, cells, laid_out, markdown, newest, read, rounded

CHUNK = 8
"""Thousands of tokens that a step of prefill takes, by SGLang's default on these GPUs."""


def ranks_table() -> str:
    """``serving_tp_h200.csv``: Kascade over FlashAttention-3, a row a model and workload."""
    rows = newest(RESULTS / "serving_tp_h200.csv", SERVING)
    lines = []
    for (model, name), found in rows.groupby(["model", "workload"], sort=False):
        workload = WORKLOADS[name]
        figures = medians(found, workload)
        _, ratio = compare(figures, workload)
        ranks = found["flags"].iloc[0].split("--tp-size ")[1].split()[0]
        shown = (rounded(figures[backend]) for backend in ("kascade", "fa3"))
        lines.append([model, ranks, name, f"`{workload.figure}`", *shown, f"{ratio:.2f}x"])
    return markdown(["model", "GPUs", "workload", "figure", "kascade", "fa3", "ratio"], lines)


def rank_profile_table() -> str:
    """``serving_profile_tp_h200.csv``: ms of a decode step and of 1K tokens of prefill.

    Where ranks differ, the least and the most of them. What attends and selects is one row.
    """
    rows = read(RESULTS / "serving_profile_tp_h200.csv")
    stage = rows["stage"].str.split(", rank ", expand=True)
    kinds = {"matrix products", "all-reduce", "other", "idle"}
    kind = rows["kernel"].where(rows["kernel"].isin(kinds), "attention and selection")
    per = stage[0].map({"decode": STEPS, "extend": STEPS * CHUNK})
    rows = rows.assign(kernel=kind, stage=stage[0], rank=stage[1], ms=rows["ms"] / per)
    sums = rows.groupby(["kernel", "stage", "backend", "rank"], sort=False)["ms"].sum()
    every = sums.groupby(["stage", "backend", "rank"]).sum()
    all_ = pd.concat({"all": every}, names=["kernel"])
    by_rank = pd.concat([sums, all_]).groupby(["kernel", "stage", "backend"], sort=False)
    shown = by_rank.agg(lambda ms: "-".join(dict.fromkeys(cells([ms.min(), ms.max()], "{:.2f}"))))
    columns = list(itertools.product(("decode", "extend"), ("fa3", "kascade")))
    return laid_out([""], shown.unstack(["stage", "backend"])[columns], "{}")
