"""Tables of what answers lose by anchors and pools, without a server."""

from benchmarks.tables import RESULTS, laid_out, markdown, newest, read


def anchors_table() -> str:
    """``bench_anchors.py``: what a real model's answers lose, by how anchors were chosen."""
    rows = newest(RESULTS / "anchors.csv", ("model", "chosen_by", "anchors", "tokens"))
    lines = []
    for row in rows.to_dict("records"):
        losses = [f"{row[name]:.4f}" for name in ("decode_kl", "whole_kl")]
        tried = f"{row['prompts']} of {row['tokens']}"
        chosen = (row["model"], row["chosen_by"], str(row["count"]), row["anchors"])
        lines.append([*chosen, *losses, tried])
    header = ["model", "anchors chosen by", "count", "layers", "decode", "whole", "chats, tokens"]
    return markdown(header, lines)


def pools_table() -> str:
    """``bench_pools.py``: what answers lose by pools, one row a set of makers and ranking."""
    rows = read(RESULTS / "candidate_pools.csv").drop_duplicates(
        ["model", "anchors", "makers", "ranked_by", "share", "tokens"], keep="last"
    )
    columns = {"index": ["model", "anchors", "makers", "ranked_by", "tokens"], "columns": "share"}
    table = rows.pivot_table(values="decode_kl", sort=False, **columns)
    header = ["model", "anchors", "that score all keys", "ranked by", "tokens, at most"]
    return laid_out(header, table, "{:.4f}")
