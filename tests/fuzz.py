"""Random cases against the float64 reference, and steps against themselves: ``make fuzz``.

A case is a kind and a seed, which draws its shapes, lengths, types, lists, budgets and logits.
Every failure prints the command that runs it alone, again. On a CPU kernels run in Triton's
interpreter (``TRITON_INTERPRET=1``), where cases are small.

    operations  kernels err no more than the same computation in eager low precision does, or than
                one rounding of the result
    schedules   a request's selections and outputs have the same bits whatever its chunks, slots,
                company and memory for scores are
"""

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kascade_kernels import reference
from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.merge_parts import Parts
from kascade_sglang.files import append_csv
from kascade_sglang.provenance import provenance
from tests.backend.test_backend import assert_same
from tests.kernels import (
    test_decode_attention,
    test_decode_scores,
    test_select_slots,
    test_tile_attention,
    test_tile_scores,
)
from tests.support.decode_case import DecodeCase
from tests.support.harness import Harness
from tests.support.interpreter import add_bfloat16, leave_out_programs
from tests.support.shapes import DEVICE, INTERPRETED
from tests.support.tile_case import TileCase

LONG = 190 if DEVICE == "cpu" else 3000
EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129)
TYPES = (torch.float16, torch.bfloat16)
COLUMNS = ["kind", "cases", "wrong", "first_seed", "seconds"]
COLUMNS += ["device", "versions", "commit", "date"]


def length(draw: random.Random) -> int:
    """Draw a length: around the edges of tiles, or any."""
    return draw.choice(EDGES) if draw.random() < 0.5 else draw.randint(1, LONG)


def shape(draw: random.Random) -> dict:
    """Draw heads, type, page size and how far logits spread: near ties, as usual, or huge."""
    dims = (16, 32, 64, 128) if DEVICE == "cpu" else (64, 128, 256)
    return {
        "kv_heads": draw.randint(1, 3),
        "group": draw.randint(1, 16),
        "dim": draw.choice(dims),
        "page_size": draw.choice((1, 2, 16, 32, 64)),
        "dtype": draw.choice(TYPES),
        "spread": draw.choice((1e-3, 2.0, 2.0, 60.0)),
        "seed": draw.getrandbits(31),
    }


def extends(draw: random.Random) -> list[tuple[int, int]]:
    """Draw requests of (positions that a cache held, length)."""
    lengths = [length(draw) for _ in range(draw.randint(1, 3))]
    return [(draw.choice((0, draw.randrange(end))), end) for end in lengths]


def rounding(values: torch.Tensor) -> float:
    """One rounding of a mean of these values."""
    return torch.finfo(values.dtype).eps * float(values.nan_to_num().abs().max())


def tile_attention(draw: random.Random) -> None:
    """Tiles attend to lists of any length, none and all of the candidates included."""
    case = TileCase.make(extends(draw), **shape(draw))
    candidates = [TILE * tile_of(end - 1) for _, end, _, _ in case.places]
    counts = [draw.choice((0, most, draw.randint(0, most))) for most in candidates]
    kv_heads = case.k.shape[1]
    lists = draw.choice((1, kv_heads))
    head_map = [draw.randrange(lists) for _ in range(kv_heads)]
    found = case.draw_lists(counts, lists)
    test_tile_attention.check(case, found, head_map, max(1e-5, rounding(case.v)))


def tile_selection(draw: random.Random) -> None:
    """Codes of a tile's scores are the exact scores' within a step."""
    case = TileCase.make(extends(draw), **shape(draw))
    pooled = draw.random() < 0.3
    codes = test_tile_scores.score(case, pooled=pooled)
    test_tile_scores.check_codes(case, codes, steps=1, pooled=pooled)


def decoding_attention(draw: random.Random) -> None:
    """Decode rows attend to lists whose lengths differ by row and head."""
    lengths = [length(draw) for _ in range(draw.randint(1, 4))]
    case = DecodeCase.make(lengths, **shape(draw))
    slots, kv_heads, dim = case.k.shape
    counts = [[draw.randint(1, min(n, slots)) for _ in range(kv_heads)] for n in lengths]
    lists, drawn = test_decode_attention.make_lists(counts, kv_heads, slots)
    order = draw.sample(range(kv_heads), kv_heads)
    head_map = torch.tensor(order, dtype=torch.int32, device=DEVICE)
    spans = test_decode_attention.spans_of(lists)
    parts = Parts.allocate(spans, case.q.shape[1], dim)
    out = decode_attention(case.q, case.k, case.v, lists, spans, head_map, case.scale, parts)
    group = case.q.shape[1] // kv_heads
    for row, own in enumerate(drawn):
        for head, source in enumerate(order):
            of = slice(head * group, (head + 1) * group)
            q, k, v = case.q[row, of], case.k[:, head : head + 1], case.v[:, head : head + 1]
            mapped = own[source].to(DEVICE)[None]
            exact = reference.decode_attention(
                q.double(), k.double(), v.double(), mapped, case.scale
            )
            eager = test_decode_attention.eager_attention(q, k, v, mapped, case.scale)
            error, allowed = ((x.double() - exact).abs().max() for x in (out[row, of], eager))
            assert error <= max(float(allowed), rounding(v), 1e-5)


def decode_selection(draw: random.Random) -> None:
    """Decode rows select what the reference selects."""
    case = DecodeCase.make([length(draw) for _ in range(draw.randint(1, 4))], **shape(draw))
    budget = Budget(draw.choice((0.05, 0.1, 0.3, 1.0)), draw.choice((64, 70, 128, 4096)))
    pooled = draw.random() < 0.3
    selection, _, _ = test_decode_scores.run(case, budget, pooled)
    test_decode_scores.check_selection(case, selection, budget, pooled)


def ties(draw: random.Random) -> None:
    """Among equal codes the earlier positions are selected, whatever their number."""
    torch.manual_seed(draw.getrandbits(31))
    lengths = [length(draw) for _ in range(draw.randint(1, 4))]
    case, heads = DecodeCase.make(lengths), draw.randint(1, 3)
    most = [TILE * tile_of(n - 1) for n in lengths]
    counts = [[draw.choice((0, n, draw.randint(0, n))) for _ in range(heads)] for n in most]
    kind = draw.choice(("constant", "few", "extremes", "near", "any"))
    codes = test_select_slots.draw_codes(kind, (len(lengths), heads, max(lengths)))
    selected = test_select_slots.select(case, codes, counts, append_own=draw.random() < 0.5)
    test_select_slots.check(case, codes, selected, counts)


def schedules(draw: random.Random) -> None:
    """Alone in one chunk, or in drawn chunks with company on other slots: the same bits."""
    lengths = [length(draw) for _ in range(draw.randint(1, 3))]
    options = {
        "kv_heads": draw.randint(1, 3),
        "group": draw.choice((1, 2, 4, 5, 7, 8, 16)),
        "heads": draw.choice(("per_head", "pooled")),
        "page_size": draw.choice((1, 16, 32)),
        "exact": draw.random() < 0.5,
        "budget": Budget(draw.choice((0.05, 0.1, 0.5)), draw.choice((64, 128))),
        "batch_invariant": True,
        "data_seed": draw.getrandbits(20),
    }
    alone = Harness(lengths, **options)
    for request, end in enumerate(lengths):
        alone.step([(request, 0, end)], ForwardMode.EXTEND)
    other = Harness(lengths, slot_seed=draw.getrandbits(20), score_memory=2**17, **options)
    begins = [0] * len(lengths)
    while begins != lengths:
        open_ = [n for n, end in enumerate(lengths) if begins[n] < end]
        spans = []
        for n in draw.sample(open_, draw.randint(1, len(open_))):
            # Chunks end with tiles, as pages do; the last ends with the request.
            end = min(begins[n] + TILE * draw.randint(1, 4), lengths[n])
            spans.append((n, begins[n], end))
            begins[n] = end
        # Single tokens are a prompt's end here, too: decode steps sum in another order.
        other.step(spans, ForwardMode.EXTEND)
    for request in range(len(lengths)):
        assert_same(alone, other, request)


KINDS: dict[str, Callable[[random.Random], None]] = {
    kind.__name__: kind
    for kind in (
        tile_attention,
        tile_selection,
        decoding_attention,
        decode_selection,
        ties,
        schedules,
    )
}


def wrong(kind: str, seed: int) -> str | None:
    """Run a case; returns what went wrong, None if nothing did."""
    try:
        KINDS[kind](random.Random(f"{kind} {seed}"))
    except Exception:  # Whatever a kernel or the backend raises is a find.
        return traceback.format_exc(limit=-4)
    return None


def fuzz(kinds: list[str], seeds: range, seconds: float) -> list[dict[str, object]]:
    """Run cases of every kind in turn until the time is over; returns a row a kind."""
    begin, cases, found, spent = time.monotonic(), Counter(), Counter(), Counter()
    for seed in seeds:
        for kind in kinds:
            start = time.monotonic()
            error = wrong(kind, seed)
            cases[kind] += 1
            spent[kind] += time.monotonic() - start
            if error is not None:
                found[kind] += 1
                print(f"{error}python -m tests.fuzz --kinds {kind} --seed {seed} --cases 1\n")
        if time.monotonic() - begin > seconds:
            break
    return [
        {
            "kind": kind,
            "cases": cases[kind],
            "wrong": found[kind],
            "first_seed": seeds[0],
            "seconds": f"{spent[kind]:.0f}",
        }
        for kind in kinds
    ]


def main() -> int:
    """Fuzz, print the counts, and append them to a CSV where one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="to go on for")
    parser.add_argument("--cases", type=int, default=10**9, help="at most, of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, help="CSV to append to")
    options = parser.parse_args()
    if DEVICE == "cpu" and not INTERPRETED:
        parser.error("expected a GPU, or TRITON_INTERPRET=1 in the environment, got neither")
    seeds = range(options.seed, options.seed + options.cases)
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            add_bfloat16(patch)
            leave_out_programs(patch)
        rows = fuzz(options.kinds, seeds, options.seconds)
    for row in rows:
        print("{kind}: {cases} cases, {wrong} wrong, {seconds} s".format(**row))
    if options.out:
        stamp = provenance()
        stamp.pop("dtype")  # Each case draws its own.
        append_csv(options.out, COLUMNS, [{**row, **stamp} for row in rows])
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
