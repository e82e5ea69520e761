"""What the kernel benchmarks share: a KV pool, the paths that the server runs, timing and rows.

One layer of each kind is timed as the backend runs it. Both plans have the same heads, so a
composite is a sum over the plan's layers.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
from tqdm import tqdm

from benchmarks.plot_kernels import plot
from kascade_kernels.budget import TILE, Budget
from kascade_sglang.backend import path as contract
from kascade_sglang.backend.paths import Paths, build_paths
from kascade_sglang.config import KascadeConfig
from kascade_sglang.files import append_csv
from kascade_sglang.host.dense import FP8_TYPES
from kascade_sglang.host.steps import Batch, Layer, Rank
from kascade_sglang.plan.schema import ModelShape, Plan
from kascade_sglang.provenance import gpu_provenance
from kascade_sglang.settings import MIN_K, PREFILL_MIN_K

RESULTS = Path(__file__).parent / "results"
COLUMNS = """case kind plan mode method inputs ms fa3_ms speedup share tb_per_s scratch_mb
    gpu versions commit date""".split()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""A CPU runs the steps in Triton's interpreter, for tests; nothing is timed there."""
KV_HEADS, GROUP, DIM = 8, 4, 128
Q_HEADS = KV_HEADS * GROUP
DTYPE = torch.bfloat16
SCALE = DIM**-0.5
PLANS = {"llama-3.1-8b": (32, (0, 2, 8, 13, 14)), "qwen3-8b": (36, (0, 2, 7, 14, 23))}
"""Layers and anchors, from the paper, section 4.1; both have 8 KV heads, group 4, head dim 128."""
POOL_PLANS = {
    "10-anchors": {"layer0": 1, "anchor": 9, "reuse": 22},
    "10-anchors-4-makers": {"layer0": 1, "maker": 4, "pooled": 5, "reuse": 22},
}
"""How often 32 layers have each kind, as what candidate pools were measured with has them
(``candidate_pools.csv``): ten anchors that score all keys, or four, for five more."""
POOL_SHARE = 0.25
LAYER0, ANCHOR, REUSE, POOLED = range(4)
"""Layers of the benchmark's model. ANCHOR makes pools for POOLED, where a plan has any."""
MODES = ("default", "fast", "exact")
FLUSH_BYTES = 256 * 2**20
"""Read before every step: several times the L2 cache of any GPU."""


Step = Callable[[], object]


class Pool:
    """A KV pool whose layers share their memory; a request's slots lie anywhere in it.

    lengths: of the requests. shared: positions from 0 on that all requests have in common.
    context: positions of the slot table, the longest request's where not given.
    kv_cache_dtype: as the server's flag. In fp8, k and v are what the same pool holds in bfloat16,
    for the kernels that ours are compared with.
    """

    page_size = 1

    def __init__(
        self,
        lengths: list[int],
        inputs: str,
        shared: int = 0,
        context: int | None = None,
        kv_cache_dtype: str = "auto",
    ) -> None:
        own = [length - shared for length in lengths]
        self.size = shared + sum(own)
        self.memory_saver_adapter = TorchMemorySaverAdapter.create(enable=False)
        order = torch.randperm(self.size, device=DEVICE, dtype=torch.int32)
        prefix, *rest = order.split([shared, *own])
        positions = context or max(lengths)
        self.table = torch.zeros(len(lengths), positions, dtype=torch.int32, device=DEVICE)
        for row, slots in zip(self.table, rest, strict=True):
            row[:shared] = prefix
            row[shared : shared + len(slots)] = slots
        shape = (self.size + self.page_size, KV_HEADS, DIM)
        self.k = torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_()
        self.v = torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_()
        self._topics = torch.randn(64, KV_HEADS, DIM, device=DEVICE)
        self._inputs = inputs
        if inputs == "heavy_tailed":
            for row, length in zip(self.table, lengths, strict=True):
                self._add_topics(row[:length].long())
        self.kv_cache_dtype = kv_cache_dtype
        stored = FP8_TYPES.get(kv_cache_dtype, DTYPE)
        # Of bfloat16 these are the same tensors.
        self.stored_k, self.stored_v = self.k.to(stored), self.v.to(stored)

    def _add_topics(self, slots: torch.Tensor) -> None:
        """Give runs of 64 keys a common direction, so that what is selected lies in runs."""
        topic = torch.randint(64, (-(-len(slots) // 64),), device=DEVICE)
        for first in range(0, len(slots), 8192):
            part = slots[first : first + 8192]
            chosen = topic[first // 64 :].repeat_interleave(64)[: len(part)]
            self.k[part] = (self._topics[chosen] + self.k[part]).to(DTYPE)

    def queries(self, count: int) -> torch.Tensor:
        """Queries [count, Hq, D]; heavy-tailed ones want three topics, 32 queries the same."""
        q = torch.empty(count, Q_HEADS, DIM, dtype=DTYPE, device=DEVICE).normal_()
        if self._inputs == "heavy_tailed":
            tiles = -(-count // TILE)
            wanted = torch.randint(64, (tiles, 3), device=DEVICE)
            weights = torch.rand(tiles, 3, 1, 1, device=DEVICE) * SCALE * 4
            common = (self._topics[wanted] * weights).sum(1).repeat_interleave(GROUP, 1)
            q += common.repeat_interleave(TILE, 0)[:count].to(DTYPE)
        return q

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Keys [slots, H, D]."""
        return self.stored_k

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """Values [slots, H, D]."""
        return self.stored_v

    @property
    def fp8(self) -> bool:
        """Whether keys and values are stored in 8 bits."""
        return self.stored_k.dtype != DTYPE

    def layer(self, index: int) -> Layer:
        """One of the benchmark's three layers."""
        return Layer(index, SCALE, 1.0 if self.fp8 else None)


def new_tokens(pool: Pool, spans: list[tuple[int, int]], *, decode: bool) -> Batch:
    """A step in which these positions are new, one span a request."""
    slots = [pool.table[row, begin:end] for row, (begin, end) in enumerate(spans)]
    begins, ends = np.array(spans, dtype=np.int64).T
    return Batch(
        decode=decode,
        requests=torch.arange(len(spans), device=DEVICE),
        ends=torch.from_numpy(ends.copy()).to(DEVICE),
        written=torch.cat(slots).long(),
        ends_cpu=ends,
        prefixes_cpu=None if decode else begins.tolist(),
    )


def budgets(mode: str) -> tuple[Budget, Budget]:
    """Return what a mode attends to in decoding and in prefill."""
    if mode == "default":
        return Budget(min_k=MIN_K), Budget(min_k=PREFILL_MIN_K)
    return Budget(), Budget()


def make_paths(pool: Pool, mode: str, *, pools: bool = False) -> Paths:
    """Build what the backend would, for a model of one layer of each kind.

    mode: ``default``; ``fast``, the preset; ``exact``, that with ``--kascade-exact``.
    pools: whether there is a layer that scores a candidate pool, and ANCHOR makes it.
    """
    maps = torch.rand(KV_HEADS, KV_HEADS, generator=torch.Generator().manual_seed(0)).tolist()
    rows, count = tuple(map(tuple, maps)), 4 if pools else 3
    shape = ModelShape(count, Q_HEADS, KV_HEADS, DIM, Q_HEADS * DIM)
    anchors, borrowed = (LAYER0, ANCHOR, POOLED)[: count - 1], {REUSE: rows}
    if pools:
        borrowed[POOLED] = rows
    makes = {"makers": (ANCHOR,), "pool_share": POOL_SHARE} if pools else {}
    plan = Plan("benchmark", shape, anchors, borrowed, **makes)
    rank = Rank(range(KV_HEADS), range(count), pool.table, pool.size + pool.page_size, DEVICE)
    decode, prefill = budgets(mode)
    options = {"exact": mode == "exact", "kv_cache_dtype": pool.kv_cache_dtype}
    config = KascadeConfig(plan, decode, "per_head", prefill=prefill, **options)
    paths = build_paths(rank, pool, config)
    for index in plan.anchors:
        paths.kv.copy(index, torch.arange(pool.size, device=DEVICE))
    return paths


class LayerRuns:
    """One step of a path, and what the backend does in the layers after layer 0."""

    def __init__(
        self, pool: Pool, paths: Paths, path: contract.Path, batch: Batch, q: torch.Tensor
    ) -> None:
        self._pool, self._paths, self._path, self._batch, self._q = pool, paths, path, batch, q
        path.prepare(batch)
        self.step = path.record(batch)

    def select(self, index: int, out: torch.Tensor | None = None) -> None:
        """Copy a layer's new keys, select and keep; with ``out`` also attend to every key."""
        self._paths.kv.copy(index, self._batch.written)
        layer, store = self._pool.layer(index), self._paths.store
        store.put(index, self._path.select(self.step, self._q, layer, out, store))

    def attend(self, index: int) -> torch.Tensor:
        """Attend to what a layer's anchor selected."""
        kept = self._paths.store.get(index)
        return self._path.attend(self.step, self._q, self._pool.layer(index), *kept)

    def anchor(self) -> None:
        """Run an anchor; where the plan has pools, a maker."""
        self.select(ANCHOR)
        self.attend(ANCHOR)

    def pooled(self) -> None:
        """Run an anchor that scores what the maker left."""
        self.select(POOLED)
        self.attend(POOLED)

    def reuse(self) -> None:
        """Run a layer that reuses the anchor's selection."""
        self.attend(REUSE)


def measure(step: Step, repeats: int = 11) -> float:
    """Time of a step in ms, L2 cold: the median over replays of a graph of several.

    Between steps a graph reads memory that is larger than the L2 cache, as the weights of other
    layers are; what that takes is measured alone and subtracted. flashinfer's ``bench_gpu_time``
    makes a graph's steps cold by copies of their inputs, which here are a whole KV pool.
    """
    cold = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=DEVICE).normal_()
    copies = max(1, min(8, int(10 / _median_ms([cold.sum, step], 1))))
    both = _median_ms([cold.sum, step] * copies, repeats)
    return (both - _median_ms([cold.sum] * copies, repeats)) / copies


def _median_ms(steps: list[Step], repeats: int) -> float:
    """Median time of a captured sequence of steps, in ms."""
    for step in dict.fromkeys(steps):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


class Row(NamedTuple):
    """One measurement; fa3_ms: FlashAttention-3 on the same work, in the same run."""

    case: str
    kind: str
    mode: str
    ms: float
    fa3_ms: float
    inputs: str = "random"
    plan: str = ""
    method: str = "kascade"
    bytes: float = 0
    scratch: float = 0

    def cells(self) -> dict[str, Any]:
        """Return the CSV's cells, without those that say where it was measured."""
        return {
            "case": self.case,
            "kind": self.kind,
            "plan": self.plan,
            "mode": self.mode,
            "method": self.method,
            "inputs": self.inputs,
            "ms": f"{self.ms:.4f}",
            "fa3_ms": f"{self.fa3_ms:.4f}",
            "speedup": f"{self.fa3_ms / self.ms:.3f}",
            "share": f"{self.ms / self.fa3_ms:.4f}",
            "tb_per_s": f"{self.bytes / self.ms / 1e9:.2f}" if self.bytes else "",
            "scratch_mb": f"{self.scratch / 2**20:.0f}" if self.scratch else "",
        }


def composites(kinds: dict[str, Row], step: float = 0.0) -> Iterator[Row]:
    """Sum a step of each plan's attention; ``step``: what it costs once, in ms."""
    layer0, anchor, reuse = (kinds[kind] for kind in ("layer0", "anchor", "reuse"))
    for plan, (layers, anchors) in PLANS.items():
        counts = (1, len(anchors) - 1, layers - len(anchors))
        rows = zip(counts, (layer0, anchor, reuse), strict=True)
        ms = step + sum(count * row.ms for count, row in rows)
        fa3 = layers * layer0.fa3_ms
        yield layer0._replace(kind="composite", plan=plan, ms=ms, fa3_ms=fa3, bytes=0, scratch=0)


def pool_composites(kinds: dict[str, Row], step: float) -> Iterator[Row]:
    """Sum steps of plans with many anchors, all scoring all keys or most of them a pool."""
    for plan, counts in POOL_PLANS.items():
        ms = step + sum(count * kinds[kind].ms for kind, count in counts.items())
        fa3 = sum(counts.values()) * kinds["layer0"].fa3_ms
        name = {"kind": "pool_composite", "plan": plan}
        yield kinds["layer0"]._replace(**name, ms=ms, fa3_ms=fa3, bytes=0, scratch=0)


def append_rows(path: Path, rows: list[Row], stamp: dict[str, str]) -> None:
    """Add rows to a CSV, newest last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_csv(path, COLUMNS, ({**row.cells(), **stamp} for row in rows))


def print_rows(rows: list[Row]) -> None:
    """Print a short table."""
    for row in rows:
        name = f"{row.case:>18} {row.kind:12} {row.plan:12} {row.mode:8} {row.method:10}"
        print(
            f"{name} {row.inputs:12} {row.ms:9.4f} ms  {row.ms / row.fa3_ms:.4f} of FA3 "
            f"({row.fa3_ms / row.ms:.2f}x)"
        )


def command_line(name: str, description: str, cases: dict[str, Any]) -> argparse.ArgumentParser:
    """Return the parser of a kernel benchmark: ``decode`` or ``prefill``."""
    parser = argparse.ArgumentParser(prog=f"make bench-{name}", description=description)
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--kv-cache-dtype", choices=["auto", *FP8_TYPES], default="auto")
    parser.add_argument("--out", type=Path, help="the CSV; by default one for each type of cache")
    parser.add_argument("--commit", help="what to write as the commit, outside a repository")
    return parser


def run(
    name: str,
    options: argparse.Namespace,
    heavy_tailed: tuple[str, ...],
    measure_case: Callable[[str, str], Iterable[Row]],
) -> int:
    """Measure, append to the CSV as cases are done, print and draw; returns the exit status.

    heavy_tailed: cases measured on clustered selections, too. measure_case: (case, inputs) -> rows.
    """
    if not torch.cuda.is_available():
        sys.exit(f"bench-{name}: expected a CUDA GPU, got none; run it on a machine that has one")
    stamp = gpu_provenance(options.commit)
    kind = "" if options.kv_cache_dtype == "auto" else f"_{options.kv_cache_dtype}"
    out = options.out or RESULTS / f"{name}{kind}_h100.csv"
    every: list[Row] = []
    for case in tqdm(options.cases, unit="case"):
        for inputs in ("random", "heavy_tailed")[: 1 + (case in heavy_tailed)]:
            rows = list(measure_case(case, inputs))
            append_rows(out, rows, stamp)
            every += rows
            torch.cuda.empty_cache()
    print_rows(every)
    plot(out, out.with_suffix(".png"))
    return 0
