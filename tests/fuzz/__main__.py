"""Run random cases until the time or the number of cases is over."""

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kascade_sglang.files import append_csv
from kascade_sglang.provenance import provenance
from tests.fuzz.decode import decode
from tests.fuzz.prefill import prefill
from tests.fuzz.steps import schedules, ties
from tests.support.interpreter import compute_as_on_gpus, leave_out_programs
from tests.support.shapes import DEVICE, INTERPRETED

KINDS: dict[str, Callable[[random.Random], int]] = {
    kind.__name__: kind for kind in (prefill, decode, ties, schedules)
}
RARELY = {"schedules": 8}
"""Kinds that run with every so many seeds: many steps for few cases."""
COLUMNS = ["kind", "cases", "wrong", "first_seed", "seconds"]
COLUMNS += ["device", "versions", "commit", "date"]
REPORT_AFTER = 30
"""Seconds between two lines of progress."""


def run(kind: str, seed: int) -> tuple[int, str | None]:
    """Run a launch; returns how many cases it held, and what went wrong, None if nothing did."""
    try:
        return KINDS[kind](random.Random(f"{kind} {seed}")), None
    except Exception:  # Whatever a kernel or the backend raises is a find.
        return 1, traceback.format_exc(limit=-4)


def fuzz(kinds: list[str], first: int, cases: int, seconds: float) -> list[dict[str, object]]:
    """Launch every kind in turn until there were so many cases, or the time is over.

    Returns a row a kind; ``wrong`` counts launches.
    """
    begin = said = time.monotonic()
    done, found, spent = Counter(), Counter(), Counter()
    seed = first
    while done.total() < cases and time.monotonic() - begin < seconds:
        for kind in kinds:
            if len(kinds) > 1 and seed % RARELY.get(kind, 1):
                continue
            start = time.monotonic()
            count, error = run(kind, seed)
            done[kind] += count
            spent[kind] += time.monotonic() - start
            if error is not None:
                found[kind] += 1
                again = f"python -m tests.fuzz --kinds {kind} --seed {seed} --cases 1"
                print(f"{error}{again}\n", flush=True)
        if time.monotonic() - said > REPORT_AFTER:
            said = time.monotonic()
            print(f"{said - begin:.0f} s: {done.total()} cases, {found.total()} wrong", flush=True)
        seed += 1
    return [
        {
            "kind": kind,
            "cases": done[kind],
            "wrong": found[kind],
            "first_seed": first,
            "seconds": f"{spent[kind]:.0f}",
        }
        for kind in kinds
    ]


def main() -> int:
    """Fuzz, print the counts, and append them to a CSV where one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="to go on for")
    parser.add_argument("--cases", type=int, default=10**9, help="at least, of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, help="CSV to append to")
    options = parser.parse_args()
    if DEVICE == "cpu" and not INTERPRETED:
        parser.error("expected a GPU, or TRITON_INTERPRET=1 in the environment, got neither")
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            compute_as_on_gpus(patch)
            leave_out_programs(patch)
        rows = fuzz(options.kinds, options.seed, options.cases, options.seconds)
    for row in rows:
        print("{kind}: {cases} cases, {wrong} wrong, {seconds} s".format(**row))
    if options.out:
        stamp = provenance()
        stamp.pop("dtype")  # Each shape has its own.
        append_csv(options.out, COLUMNS, [{**row, **stamp} for row in rows])
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
