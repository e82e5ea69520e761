"""Decode attention on a GPU beside FlashAttention-3: ``make bench-decode``.

Every measurement is the replay of a CUDA graph, L2 cold, slots in random order at page size 1.
"""

import sys
from collections.abc import Iterator

import torch

from benchmarks.kernel_common import (
    ANCHOR,
    DEVICE,
    DIM,
    KV_HEADS,
    LAYER0,
    MODES,
    POOL_SHARE,
    Q_HEADS,
    SCALE,
    LayerRuns,
    Pool,
    Row,
    budgets,
    command_line,
    composites,
    make_paths,
    measure,
    new_tokens,
    pool_composites,
    run,
)
from benchmarks.rivals import (
    fa3_decode,
    flashinfer_attend,
    flashinfer_cascade,
    flashinfer_decode,
    flashinfer_select,
    torch_select,
)
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import Budget, PoolRule, tile_of
from kascade_kernels.decode_lists import Budgets, Spans, decode_lists
from kascade_kernels.decode_scores import ScoreScratch, decode_scores
from kascade_kernels.find_shared_prefixes import SharedPrefix, find_shared_prefixes
from kascade_kernels.merge_parts import Parts
from kascade_kernels.select_slots import select_slots
from kascade_kernels.structs import Rows
from kascade_sglang.host.steps import Batch

K = 1024
CONTEXT = 128 * K
"""Positions of the slot table: scratch is laid out for the longest request that may come."""


def mixed_lengths() -> list[int]:
    """32 lengths from 256 to 64K, log-uniform."""
    draw = torch.Generator().manual_seed(0)
    return (256 * 256 ** torch.rand(32, generator=draw)).int().tolist()


CASES = {
    "64x8K": [8 * K] * 64,
    "64x32K": [32 * K] * 64,
    "32x64K": [64 * K] * 32,
    "16x128K": [128 * K] * 16,
    "8x32K": [32 * K] * 8,
    "1x32K": [32 * K],
    "1x128K": [128 * K],
    "mixed": mixed_lengths(),
    "32x33K-on-32K": [33 * K] * 32,
}
SHARED = {"32x33K-on-32K": 32 * K}
"""Positions that all requests of a case have in common, in the same slots."""
HEAVY_TAILED = ("16x128K", "64x32K")
"""Cases measured on clustered selections, too."""


def bytes_read(pool: Pool, lengths: list[int], kind: str, mode: str) -> float:
    """Bytes of keys and values that a layer has to read."""
    token = KV_HEADS * DIM * pool.stored_k.element_size()
    keys = sum(lengths)
    budget, rule = budgets(mode)[0], PoolRule(POOL_SHARE)
    listed = sum(budget.attended(length - 1) for length in lengths)
    one_key = token if pool.fp8 or mode == "exact" else KV_HEADS * (DIM + 4)
    in_pools = sum(rule.pooled(tile_of(length - 1), budget) for length in lengths)
    attended = 2 * listed * token
    anchor = keys * one_key + attended
    return {
        "layer0": 2 * keys * token,
        "anchor": anchor,
        "maker": anchor,
        "pooled": in_pools * one_key + attended,
        "reuse": attended,
    }[kind]


def measure_case(
    case: str, lengths: list[int], inputs: str, rivals: bool, kv_cache_dtype: str = "auto"
) -> Iterator[Row]:
    """Measure all kinds of layer in all modes, and the plans."""
    shared = SHARED.get(case, 0)
    pool = Pool(lengths, inputs, shared, CONTEXT, kv_cache_dtype)
    spans = [(length - 1, length) for length in lengths]
    batch, q = new_tokens(pool, spans, decode=True), pool.queries(len(lengths))
    fa3_ms = measure(fa3_decode(q, pool, batch.ends))
    if kv_cache_dtype == "fp8_e4m3":
        ms = measure(fa3_decode(q, pool, batch.ends, fp8=True))
        yield Row(case, "dense", "exact", ms, fa3_ms, inputs, method="fa3_fp8")
    if pool.fp8:
        ms = measure(flashinfer_decode(q, pool, lengths))
        yield Row(case, "dense", "exact", ms, fa3_ms, inputs, method="flashinfer_fp8")
    if shared and rivals:
        cascade = measure(flashinfer_cascade(q, pool, lengths, shared))
        yield Row(case, "dense", "exact", cascade, fa3_ms, method="flashinfer_cascade")
    for mode in MODES:
        paths = make_paths(pool, mode)
        paths.decode.reserve(len(lengths))
        layers = LayerRuns(pool, paths, paths.decode, batch, q)

        def layer0(layers=layers) -> None:
            layers.select(LAYER0, out=torch.empty_like(q))

        def prepare(paths=paths) -> None:
            paths.decode.prepare(batch)
            paths.decode.record(batch)

        kinds = {}
        steps = {"layer0": layer0, "anchor": layers.anchor, "reuse": layers.reuse}
        for kind, step in steps.items():
            read = 0 if shared else bytes_read(pool, lengths, kind, mode)
            kinds[kind] = Row(case, kind, mode, measure(step), fa3_ms, inputs, bytes=read)
            yield kinds[kind]
        once = measure(prepare)
        yield from composites(kinds, once)
        if not shared:
            yield from measure_pools(pool, batch, q, kinds, once, mode)
        if mode == "exact" and rivals and not shared:
            yield from measure_rivals(case, pool, batch, q, layers, fa3_ms)


def measure_pools(
    pool: Pool,
    batch: Batch,
    q: torch.Tensor,
    kinds: dict[str, Row],
    once: float,
    mode: str,
) -> Iterator[Row]:
    """A maker, an anchor that scores its pool, and plans with and without; once: ms of a step."""
    paths = make_paths(pool, mode, pools=True)
    paths.decode.reserve(len(q))
    layers, like = LayerRuns(pool, paths, paths.decode, batch, q), kinds["anchor"]
    lengths = batch.ends.tolist()
    for kind, step in (("maker", layers.anchor), ("pooled", layers.pooled)):
        read = bytes_read(pool, lengths, kind, mode)
        kinds[kind] = like._replace(kind=kind, ms=measure(step), bytes=read)
        yield kinds[kind]
    yield from pool_composites(kinds, once)


def measure_rivals(
    case: str, pool: Pool, batch: Batch, q: torch.Tensor, layers: LayerRuns, fa3_ms: float
) -> Iterator[Row]:
    """An anchor's pieces, and other libraries' selection and attention to what is selected."""
    count, budget, context = len(q), Budget(), int(batch.ends.max())
    rows, lists = Rows(batch.requests, batch.ends), layers.step.lists
    spans = Spans.allocate(count, KV_HEADS, DEVICE)
    budgets = Budgets.of([budget] * count, DEVICE)
    decode_lists(rows.ends, KV_HEADS, budgets, spans, lists.counts)
    shared = SharedPrefix.allocate(count, Q_HEADS // KV_HEADS, DEVICE)
    find_shared_prefixes(pool.table, rows, spans, shared)
    parts = Parts.allocate(spans, Q_HEADS, DIM)
    scratch = ScoreScratch.allocate(count, Q_HEADS, KV_HEADS, context, empty_on(DEVICE))

    def score() -> None:
        where = (pool.table, rows, lists, spans, shared, SCALE, scratch, parts)
        decode_scores(q, pool.stored_k, *where)

    score()
    layers.select(ANCHOR)
    codes, most = scratch.codes, budget.selected(tile_of(context - 1))
    steps = {
        ("score", "kascade"): score,
        ("select", "kascade"): lambda: select_slots(
            codes, pool.table, rows, lists, append_own=True
        ),
        ("select", "torch"): torch_select(codes.codes, most),
        ("select", "flashinfer"): flashinfer_select(codes.codes, pool.table, rows.ends, most),
        ("attend", "kascade"): lambda: layers.attend(ANCHOR),
        ("attend", "flashinfer"): flashinfer_attend(q, pool, lists, tensor_cores=True),
    }
    for (kind, method), step in steps.items():
        yield Row(case, kind, "exact", measure(step), fa3_ms, method=method)


def main() -> int:
    """Measure, print, append to the CSV and draw."""
    parser = command_line("decode", __doc__, CASES)
    parser.add_argument("--no-rivals", action="store_true", help="Kascade and FA3 only")
    options = parser.parse_args()

    def measured(case: str, inputs: str) -> Iterator[Row]:
        compared = case in SHARED or (case in HEAVY_TAILED and inputs == "random")
        rivals = compared and not options.no_rivals
        return measure_case(case, CASES[case], inputs, rivals, options.kv_cache_dtype)

    return run("decode", options, HEAVY_TAILED, measured)


if __name__ == "__main__":
    sys.exit(main())
