"""Pools of candidates: what answers lose where most anchors score a part of the keys alone.

Some anchors, the *makers*, score all keys, and leave the best share of them as a pool; the anchors
after a maker score its pool alone, which costs them that share. Pools are ranked by a layer's
attention summed over heads (``sum``), or head by head (``head``), as the head map pairs heads.
``decode_kl``: KL divergence of the next token from dense attention's, in nats, over prompts that
were read densely, at positions where the assistant speaks. A share of 1 is no pool. No server.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.bench_anchors import add_common, layers_of, measure, stamp_of
from kascade_kernels.budget import Budget
from kascade_sglang.calibration.answers import Selecting, SparseAnswers
from kascade_sglang.calibration.hf_attention import LayerCall
from kascade_sglang.calibration.rows import Lists, best_keys, score_keys
from kascade_sglang.files import append_csv
from kascade_sglang.servers.process import run_command

RESULTS = Path(__file__).parent / "results/candidate_pools.csv"
COLUMNS = """model anchors makers ranked_by share decode_kl prompts tokens topk_ratio min_k
    gpu versions commit date""".split()
OUTSIDE = -0.5
"""Score of a key outside the pool: below every other, above those that a row must not see."""


class Pools:
    """Selection of anchors, for one run through the layers.

    makers: anchors that score all keys. share: of a prompt's keys in a pool.
    """

    def __init__(
        self, how: Selecting, makers: tuple[int, ...], share: float, ranked_by: str
    ) -> None:
        self._how, self._makers, self._share = how, makers, share
        self._by_head = ranked_by == "head"
        self._maker, self._inside = -1, torch.empty(0)

    def __call__(self, call: LayerCall, rows: torch.Tensor, budget: Budget, pooled: bool) -> Lists:
        """Select as ``select_keys`` does, of all keys or of the last maker's pool."""
        score, layers = score_keys(call, rows, pooled), self._how.layers
        if call.layer in self._makers:
            ranks = score if self._by_head else score.clamp(min=0).sum(1, keepdim=True)
            best = ranks.topk(int(self._share * score.shape[2])).indices
            self._inside = torch.zeros_like(ranks, dtype=torch.bool).scatter_(2, best, True)
            self._maker = call.layer
        elif self._maker >= 0:
            inside = self._inside
            if self._by_head:
                heads = self._how.head_maps[layers.index(self._maker), layers.index(call.layer)]
                inside = inside[:, heads.to(inside.device)]
            score = score.masked_fill(~inside & (score >= 0), OUTSIDE)
        return best_keys(score, rows, budget)


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
    how, answers = subject.how, subject.answers
    stamp = stamp_of(options, len(answers))
    pools = itertools.product(options.anchors[:1], options.makers, ("sum", "head"), options.shares)
    for anchors, makers, ranked_by, share in [
        *((anchors, anchors, "sum", 1.0) for anchors in options.anchors),
        *pools,
    ]:
        loss = 0.0
        for one in answers:
            sparse = SparseAnswers(one, how, Pools(how, makers, share, ranked_by))
            with sparse.loaded():
                loss += sparse.keep(anchors) / len(answers)
        row = {
            "anchors": " ".join(map(str, anchors)),
            "makers": " ".join(map(str, makers)),
            "ranked_by": ranked_by,
            "share": share,
            "decode_kl": f"{loss:.5f}",
        }
        append_csv(options.out, COLUMNS, [row | stamp])
        print(*row.values(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
