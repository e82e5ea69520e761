"""Pools of candidates: what answers lose where most anchors score a part of the keys alone.

Some anchors, the *makers*, score all keys, and leave the best share of them as a pool; the anchors
after a maker score its pool alone, which costs them that share. ``decode_kl``: KL divergence of the
next token from dense attention's, in nats, over prompts that were read densely, at positions where
the assistant speaks. A share of 1 is no pool. No server.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench_anchors import add_common, layers_of, measure, stamp_of
from kascade_kernels.budget import PoolRule
from kascade_sglang.calibration.answers import SparseAnswers
from kascade_sglang.calibration.pools import losses_of
from kascade_sglang.files import append_csv
from kascade_sglang.servers.process import run_command

RESULTS = Path(__file__).parent / "results/candidate_pools.csv"
COLUMNS = """model anchors makers ranked_by share decode_kl prompts tokens topk_ratio min_k
    gpu versions commit date""".split()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench_pools", description=__doc__)
    add = parser.add_argument
    add_common(add, RESULTS)
    add(
        "--anchors", type=layers_of, nargs="+", required=True, metavar="0,3,9", help="without pools"
    )
    add("--makers", type=layers_of, nargs="+", required=True, metavar="3,9", help="of the first")
    add("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5], help="of keys in a pool")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Try all, and write rows as they come."""
    options = parse_arguments(argv)
    subject = measure(options)
    how, sparse = subject.how, [SparseAnswers(one, subject.how) for one in subject.answers]
    stamp = stamp_of(options, len(sparse))
    whole = [(anchors, (), 1.0) for anchors in options.anchors]
    pools = itertools.product(options.anchors[:1], options.makers, options.shares)
    for anchors, makers, share in [*whole, *pools]:
        rule = PoolRule(share if makers else 0.5)
        [loss] = losses_of(sparse, how, anchors, [makers], rule)
        row = {
            "anchors": " ".join(map(str, anchors)),
            "makers": " ".join(map(str, makers or anchors)),
            "ranked_by": "head",
            "share": share,
            "decode_kl": f"{loss:.5f}",
        }
        append_csv(options.out, COLUMNS, [row | stamp])
        print(*row.values(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
