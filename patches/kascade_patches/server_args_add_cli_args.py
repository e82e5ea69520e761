"""Add the ``--kascade-*`` flags to SGLang's command line.

Why: a plugin cannot add fields to ServerArgs, which the parser is generated from.
How: after SGLang has filled its parser, add our group; every server command parses with it.
Remove when: SGLang offers plugins a way to declare arguments.
"""

import argparse
from typing import Any

from kascade_sglang.config import MB, PREFILL_MIN_K, PRESETS, SCORE_MEMORY

TARGET = "sglang.srt.server_args.ServerArgs.add_cli_args"
KIND = "AFTER"


def hook(result: Any, parser: argparse.ArgumentParser) -> None:
    """Declare the flags; their values are checked where all sources are merged."""
    group = parser.add_argument_group("Kascade", "sparse attention, --attention-backend kascade")
    group.add_argument(
        "--kascade-plan",
        metavar="FILE",
        help="plan made by `kascade calibrate`; default: kascade_plan.json beside the weights, "
        "or a shipped plan of that model; preset:NAME for the paper's anchors",
    )
    group.add_argument(
        "--kascade-topk-ratio",
        type=float,
        metavar="R",
        help="share of the context that a query attends to, in (0, 1]; default: the plan's",
    )
    group.add_argument(
        "--kascade-min-k",
        type=int,
        metavar="N",
        help="least number of keys that a query attends to; default: the plan's",
    )
    group.add_argument(
        "--kascade-dense-backend",
        metavar="NAME",
        help="SGLang's backend for dense layers; default: fa3 on sm_90, flashinfer on other GPUs, "
        "torch_native without one",
    )
    group.add_argument(
        "--kascade-heads",
        choices=("per_head", "pooled"),
        help="one selection per KV head, or one for all heads of a layer; default: the plan's",
    )
    group.add_argument(
        "--kascade-exact",
        action="store_true",
        default=None,
        help="score with the keys themselves instead of 8-bit copies: slower, the exact Top-k",
    )
    group.add_argument(
        "--kascade-phases",
        choices=("both", "decode"),
        help="decode: prefill attends to every key, only decoding is sparse; default: both",
    )
    group.add_argument(
        "--kascade-preset",
        choices=tuple(PRESETS),
        help="fast: prefill as sparse as decoding; balanced: the defaults; careful: dense prefill; "
        "other flags override what a preset says",
    )
    group.add_argument(
        "--kascade-prefill-topk-ratio",
        type=float,
        metavar="R",
        help="the share of the context in prefill; default: that of --kascade-topk-ratio",
    )
    group.add_argument(
        "--kascade-prefill-min-k",
        type=int,
        metavar="N",
        help="least number of keys that a query attends to in prefill; default: the plan's, or "
        f"{PREFILL_MIN_K}",
    )
    group.add_argument(
        "--kascade-score-memory-mb",
        type=int,
        metavar="N",
        help="GPU memory for one launch's scores; longer batches are scored in parts; default "
        f"{SCORE_MEMORY // MB}",
    )
