"""Prefill attention on a GPU beside FlashAttention-3: ``make bench-prefill``.

Steps run as the backend runs them, with its groups of tiles and bounded score memory; every
measurement is the replay of a CUDA graph, L2 cold, slots in random order at page size 1.
Layer 0 is FlashAttention-3 and a selection. A case in chunks is the sum over its chunks.
"""

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from kernel_common import (
    ANCHOR,
    DEVICE,
    KV_HEADS,
    LAYER0,
    MODES,
    SCALE,
    Pool,
    Row,
    Step,
    command_line,
    composites,
    layer,
    make_paths,
    measure,
    run,
    sparse_steps,
)
from rivals import fa3_extend

from kascade_kernels.arena import empty_on
from kascade_kernels.budget import Budget
from kascade_kernels.select_slots import CodeBuffer, count_high, select_slots
from kascade_kernels.tile_scores import tile_lse, tile_scores
from kascade_sglang.backend.extend_path import LSE_STRIDE
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


def extend_batch(spans: list[Span], pool: Pool) -> SimpleNamespace:
    """A step in which these positions are new."""
    slots = [pool.table[row, begin:end] for row, (begin, end) in enumerate(spans)]
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: False),
        req_pool_indices=torch.arange(len(spans), device=DEVICE),
        extend_prefix_lens_cpu=[begin for begin, _ in spans],
        extend_seq_lens_cpu=[end - begin for begin, end in spans],
        out_cache_loc=torch.cat(slots).long(),
    )


def layer_steps(paths: Paths, pool: Pool, batch, q: torch.Tensor, fa3: Step) -> dict[str, Step]:
    """What the backend does in a layer of each kind, in the order in which it may run."""
    path = paths.extend

    def layer0() -> None:
        fa3()
        paths.copies.write(LAYER0, pool.k, batch.out_cache_loc)
        path.select(q, layer(LAYER0))

    return {"layer0": layer0, **sparse_steps(paths, path, pool, batch, q)}


def scratch_bytes(step: Step) -> int:
    """Most memory that a step allocates, outside the memory reserved for scores."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_case(name: str, inputs: str) -> Iterator[Row]:
    """Measure the three kinds of layer in both modes, and the plans."""
    case = CASES[name]
    pool = Pool([end for _, end in case.steps[-1]], inputs, case.shared)
    work = []
    for spans in case.steps:
        batch = extend_batch(spans, pool)
        q = pool.queries(len(batch.out_cache_loc))
        work.append((batch, q, fa3_extend(q, pool, spans)))
    fa3_ms = sum(measure(fa3, 7) for _, _, fa3 in work)
    for mode in MODES:
        paths = make_paths(pool, exact=mode == "exact")
        kinds = {
            kind: Row(name, kind, mode, 0, fa3_ms, inputs) for kind in ("layer0", "anchor", "reuse")
        }
        for batch, q, fa3 in work:
            paths.extend.begin(batch)
            for kind, step in layer_steps(paths, pool, batch, q, fa3).items():
                ms, scratch = measure(step, 7), scratch_bytes(step)
                row = kinds[kind]
                kinds[kind] = row._replace(ms=row.ms + ms, scratch=max(row.scratch, scratch))
        yield from kinds.values()
        yield from composites(kinds)
        if name in PIECES:
            yield from measure_pieces(name, mode, inputs, pool, work[-1][1], paths, fa3_ms)


def measure_pieces(
    name: str, mode: str, inputs: str, pool: Pool, q: torch.Tensor, paths: Paths, fa3_ms: float
) -> Iterator[Row]:
    """What an anchor layer is made of."""
    rows, budget, table = paths.extend._rows, Budget(), pool.table
    keys = int(rows.ends.max())
    codes = CodeBuffer.allocate(len(rows.ends), KV_HEADS, keys, empty_on(DEVICE))
    scoring = paths.copies.scoring_keys(ANCHOR, pool.k)
    stride = LSE_STRIDE if mode == "default" else 1
    lse = tile_lse(q, pool.k, table, rows, SCALE, budget, stride=stride, max_end=keys)
    paths.extend.select(q, layer(ANCHOR))
    selection, _ = paths.store.get(ANCHOR)

    def select() -> None:
        count_high(codes, rows, budget)
        select_slots(codes, table, rows, budget, selection, append_own=False)

    steps = {
        "lse": lambda: tile_lse(
            q, pool.k, table, rows, SCALE, budget, stride=stride, max_end=keys, out=lse
        ),
        "score": lambda: tile_scores(q, scoring, table, rows, lse, SCALE, budget, out=codes.codes),
        "select": select,
        "attend": lambda: paths.extend.attend(q, layer(ANCHOR)),
    }
    for kind, step in steps.items():
        yield Row(name, kind, mode, measure(step, 7), fa3_ms, inputs)


def main() -> int:
    """Measure, print, append to the CSV and draw."""
    options = command_line("prefill", __doc__, CASES).parse_args()
    return run("prefill", options, HEAVY_TAILED, measure_case)


if __name__ == "__main__":
    sys.exit(main())
