"""What decoding and prefill must move and multiply, beside their times: ROOFLINE.md's tables.

Shape: KV_HEADS heads of DIM, GROUP query heads each, in bfloat16, at the default budgets. The
ceilings are what FlashAttention-3 reached in the same run: bytes read in decoding, products in
prefill.
"""

import pandas as pd

from benchmarks.tables import KERNELS, RESULTS, markdown, newest
from kascade_kernels.budget import Budget
from kascade_kernels.tuning import CHUNK, STEP
from kascade_sglang.settings import MIN_K, PREFILL_MIN_K

KV_HEADS, GROUP, DIM = 8, 4, 128
SHAPES = {"64x32K": (64, 32 * 1024), "16x128K": (16, 128 * 1024), "8x32K": (8, 32 * 1024)}
"""Rows of a case of decoding, and their lengths."""
DECODE, PREFILL = Budget(min_k=MIN_K), Budget(min_k=PREFILL_MIN_K)
KEY, VALUE, COPY = 2 * DIM, 2 * DIM, DIM + 4
"""Bytes of a token in one head; the copy has a scale."""
SHARES = ["bound, of FA3", "ours, of FA3", "reached"]
LOGITS = GROUP * (2 + 4 / STEP)
CODE = 2
HIGH, LOW = (256 * size / CHUNK for size in (2, 4))
"""Counts of high and low bytes, spread over the codes of a chunk."""


def moved(case: str) -> dict[tuple[str, str], float]:
    """Bytes that a kernel must read and write, by (kind, kernel)."""
    rows, length = SHAPES[case]
    listed = DECODE.attended(length - 1) / length  # of the keys
    bytes_a_key = {
        ("layer0", "decode_scores"): KEY + VALUE + LOGITS,
        ("select", "decode_scores"): COPY + LOGITS,
        ("select", "pool_scores"): LOGITS + CODE + HIGH,
        ("select", "find_high"): HIGH + LOW,
        ("select", "count_low"): CODE + LOW,
        ("select", "find_low"): HIGH + LOW,
        ("select", "emit_slots"): CODE + 8 * listed,
        ("attend", "decode_attention"): (KEY + VALUE + 4) * listed,
    }
    return {name: rows * length * KV_HEADS * each for name, each in bytes_a_key.items()}


def fa3_of(table: pd.DataFrame, case: str) -> float:
    """FlashAttention-3's time of a layer, in ms."""
    return table[table["case"] == case]["fa3_ms"].iloc[0]


def read_rate(table: pd.DataFrame, case: str) -> float:
    """Bytes a second that FlashAttention-3 read in decoding."""
    rows, length = SHAPES[case]
    return rows * length * KV_HEADS * (KEY + VALUE) / fa3_of(table, case) * 1e3


def kernel_rows(name: str) -> pd.DataFrame:
    """Newest rows of one kernel benchmark on an H200, at the default budgets, random inputs."""
    rows = newest(RESULTS / name, KERNELS)
    return rows[(rows["mode"] == "default") & (rows["inputs"] == "random")]


def decode_kernels_table() -> str:
    """One row a kernel: bytes, the time at FlashAttention-3's rate, ours, and the share."""
    layers = kernel_rows("decode_h200.csv")
    times = newest(RESULTS / "kernel_times_h200.csv", ("case", "kind", "kernel"))
    lines = []
    for case in dict.fromkeys(times["case"]):
        for (kind, kernel), size in moved(case).items():
            found = times[
                (times["case"] == case) & (times["kind"] == kind) & (times["kernel"] == kernel)
            ]
            us, least = found["us"].iloc[0], size / read_rate(layers, case) * 1e6
            numbers = (f"{size / 1e6:.0f}", f"{least:.0f}", f"{us:.0f}", f"{least / us:.0%}")
            lines.append([case, kind, kernel, *numbers])
    header = ["case", "layer", "kernel", "MB", "µs at FA3's rate", "µs", "reached"]
    return markdown(header, lines)


def decode_layers_table() -> str:
    """One row a kind of layer: all that must be moved, and the time of the whole layer."""
    parts = {"layer0": {"layer0"}, "anchor": {"select", "attend"}, "reuse": {"attend"}}

    def least(case: str, kind: str) -> float:
        return sum(size for (part, _), size in moved(case).items() if part in parts[kind])

    table, lines = kernel_rows("decode_h200.csv"), []
    for case in SHAPES:
        rate, fa3 = read_rate(table, case), fa3_of(table, case)
        for kind in parts:
            ms = _ms(table, case, kind)
            bound = least(case, kind) / rate * 1e3
            lines.append([case, kind, *_shares(bound, ms, fa3)])
    return markdown(["case", "layer", *SHARES], lines)


def prefill_layers_table() -> str:
    """One row a kind of layer of a prompt: products, at FlashAttention-3's rate, and ours."""
    table, lines = kernel_rows("prefill_h200.csv"), []
    for case, length in (("32K", 32 * 1024), ("128K", 128 * 1024)):
        fa3 = fa3_of(table, case)
        whole = length * (length + 1) / 2
        listed = float(sum(PREFILL.attended(position) for position in range(length)))
        # A product of queries and keys, in 8 bits at twice the rate, is a quarter of attention;
        # a log-sum-exp by every fourth key, in bfloat16, an eighth.
        scored = whole * (1 / 4 + 1 / 8)
        products = {"layer0": whole + scored, "anchor": scored + listed, "reuse": listed}
        for kind, pairs in products.items():
            bound = fa3 * pairs / whole
            lines.append([case, kind, *_shares(bound, _ms(table, case, kind), fa3)])
    return markdown(["prompt", "layer", *SHARES], lines)


def _ms(table: pd.DataFrame, case: str, kind: str) -> float:
    return table[(table["case"] == case) & (table["kind"] == kind)]["ms"].iloc[0]


def _shares(bound: float, ms: float, fa3: float) -> list[str]:
    return [f"{bound / fa3:.3f}", f"{ms / fa3:.3f}", f"{bound / ms:.0%}"]


def ceilings_table() -> str:
    """What FlashAttention-3 reached: TB/s in decoding, TFLOP/s in prefill."""
    decode, prefill = kernel_rows("decode_h200.csv"), kernel_rows("prefill_h200.csv")
    lines = [[case, f"{read_rate(decode, case) / 1e12:.2f} TB/s"] for case in SHAPES]
    for case, length in (("32K", 32 * 1024), ("128K", 128 * 1024)):
        flops = 4 * KV_HEADS * GROUP * DIM * length * (length + 1) / 2
        lines.append([case, f"{flops / fa3_of(prefill, case) / 1e9:.0f} TFLOP/s"])
    return markdown(["case", "FlashAttention-3"], lines)
