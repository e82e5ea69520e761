"""Prefill attention on a GPU beside FlashAttention-3: ``make bench-prefill``.

Steps run as the backend runs them, with its groups of tiles and bounded score memory; every
measurement is the replay of a CUDA graph, L2 cold, slots in random order at page size 1.
Layer 0 is FlashAttention-3 and a selection. A case in chunks is the sum over its chunks.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.kernel_common import (
    ANCHOR,
    DEVICE,
    KV_HEADS,
    LAYER0,
    MODES,
    SCALE,
    LayerRuns,
    Pool,
    Row,
    Step,
    command_line,
    composites,
    make_paths,
    measure,
    new_tokens,
    run,
)
from benchmarks.rivals import fa3_extend
from kascade_kernels.arena import empty_on
from kascade_kernels.select_slots import CodeBuffer, count_high, select_slots
from kascade_kernels.tile_lse import tile_lse
from kascade_kernels.tile_scores import tile_scores
from kascade_sglang.backend.extend import LSE_STRIDE
from kascade_sglang.backend.paths import Paths

K = 1024
Span = tuple[int, int]


class Case(NamedTuple):
    """Steps of one prefill: each a batch of positions [begin, end), one a request."""

    steps: list[list[Span]]
    shared: int = 0


CASES = {
    "8K": Case([[(0, 8 * K)]]),
    "32K": Case([[(0, 32 * K)]]),
    "64K": Case([[(0, 64 * K)]]),
    "128K": Case([[(0, 128 * K)]]),
    "128K-in-8K-chunks": Case([[(8 * K * i, 8 * K * (i + 1))] for i in range(16)]),
    "8K-on-24K": Case([[(24 * K, 32 * K)]]),
    "8K-on-120K": Case([[(120 * K, 128 * K)]]),
    "16x512-on-32K": Case([[(32 * K, 32 * K + 512)] * 16], shared=32 * K),
}
HEAVY_TAILED = ("32K", "128K", "8K-on-120K")
"""Cases measured on clustered selections, too."""
PIECES = ("8K-on-120K",)
"""Cases whose pieces are measured one by one."""


def scratch_bytes(step: Step) -> int:
    """Most memory that a step allocates, outside the memory reserved for scores."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_case(name: str, inputs: str, kv_cache_dtype: str = "auto") -> Iterator[Row]:
    """Measure the three kinds of layer in every mode, and the plans."""
    case = CASES[name]
    ends = [end for _, end in case.steps[-1]]
    pool = Pool(ends, inputs, case.shared, kv_cache_dtype=kv_cache_dtype)
    work = []
    for spans in case.steps:
        batch = new_tokens(pool, spans, decode=False)
        q = pool.queries(len(batch.written))
        work.append((batch, q, fa3_extend(q, pool, spans)))
    fa3_ms = sum(measure(fa3, 7) for _, _, fa3 in work)
    if kv_cache_dtype == "fp8_e4m3":
        # FlashAttention-3 is layer 0 there, too; of e5m2, which it does not read, as in bfloat16.
        every = zip(work, case.steps, strict=True)
        work = [(batch, q, fa3_extend(q, pool, spans, fp8=True)) for (batch, q, _), spans in every]
        ms = sum(measure(fa3, 7) for _, _, fa3 in work)
        yield Row(name, "dense", "exact", ms, fa3_ms, inputs, method="fa3_fp8")
    for mode in MODES:
        paths = make_paths(pool, mode)
        kinds = {
            kind: Row(name, kind, mode, 0, fa3_ms, inputs) for kind in ("layer0", "anchor", "reuse")
        }
        for batch, q, fa3 in work:
            layers = LayerRuns(pool, paths, paths.extend, batch, q)

            def layer0(layers=layers, fa3=fa3) -> None:
                fa3()
                layers.select(LAYER0)

            steps = {"layer0": layer0, "anchor": layers.anchor, "reuse": layers.reuse}
            for kind, step in steps.items():
                ms, scratch = measure(step, 7), scratch_bytes(step)
                row = kinds[kind]
                kinds[kind] = row._replace(ms=row.ms + ms, scratch=max(row.scratch, scratch))
        yield from kinds.values()
        yield from composites(kinds)
        if name in PIECES:
            yield from measure_pieces(name, mode, inputs, pool, q, paths, layers, fa3_ms)


def measure_pieces(
    name: str,
    mode: str,
    inputs: str,
    pool: Pool,
    q: torch.Tensor,
    paths: Paths,
    layers: LayerRuns,
    fa3_ms: float,
) -> Iterator[Row]:
    """What an anchor layer is made of."""
    rows, lists, table = layers.step.rows, layers.step.lists, pool.table
    keys, longest = pool.stored_k, int(rows.ends.max())
    codes = CodeBuffer.allocate(len(rows.ends), KV_HEADS, longest, empty_on(DEVICE))
    scoring = paths.kv.scoring_keys(ANCHOR)
    stride = 1 if mode == "exact" else LSE_STRIDE
    lse = tile_lse(q, keys, table, rows, lists, SCALE, stride=stride, max_end=longest)
    layers.select(ANCHOR)

    def select() -> None:
        count_high(codes, rows, lists)
        select_slots(codes, table, rows, lists, append_own=False)

    steps = {
        "lse": lambda: tile_lse(
            q, keys, table, rows, lists, SCALE, stride=stride, max_end=longest, out=lse
        ),
        "score": lambda: tile_scores(q, scoring, table, rows, lists, lse, SCALE, out=codes.codes),
        "select": select,
        "attend": lambda: layers.attend(ANCHOR),
    }
    for kind, step in steps.items():
        yield Row(name, kind, mode, measure(step, 7), fa3_ms, inputs)


def main() -> int:
    """Measure, print, append to the CSV and draw."""
    options = command_line("prefill", __doc__, CASES).parse_args()

    def measured(case: str, inputs: str) -> Iterator[Row]:
        return measure_case(case, inputs, options.kv_cache_dtype)

    return run("prefill", options, HEAVY_TAILED, measured)


if __name__ == "__main__":
    sys.exit(main())
