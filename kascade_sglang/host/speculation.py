"""What ServerArgs say of speculative decoding."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from kascade_sglang.host.dense import DENSE_BACKENDS, default_dense_backend
from kascade_sglang.host.facts import RefusedFlag
from kascade_sglang.host.release import VERIFIED_WITH_SPECULATION

WITH_DRAFT_MODEL = ("EAGLE", "EAGLE3", "STANDALONE")
"""Algorithms whose drafts come from a model with attention of its own."""
NGRAM = "NGRAM"
CHAINS = (None, NGRAM, *WITH_DRAFT_MODEL)
"""Algorithms that may verify a chain by one path; SGLang calls EAGLE by NEXTN, too."""
CHAIN = "1, a chain of drafts,"
DRAFTING_BACKENDS = tuple(name for name in DENSE_BACKENDS if name != "torch_native")
"""Those that draft several tokens at once, as SGLang has it."""


def algorithm_of(args: Any) -> str | None:
    """Return the algorithm, None where nothing speculates; ``args`` need not be resolved."""
    name = args.speculative_algorithm
    return None if name is None else {"NEXTN": "EAGLE"}.get(name.upper(), name.upper())


def chain_length(args: Any) -> int:
    """Return how many tokens a decode step computes for each request, of resolved ServerArgs."""
    return 1 if args.speculative_algorithm is None else args.speculative_num_draft_tokens


def refused_speculation(args: Any) -> Iterator[RefusedFlag]:
    """Yield what Kascade does not speculate with; ``args`` need not be resolved."""
    algorithm, release = algorithm_of(args), version("sglang")
    if algorithm is None:
        return
    if algorithm not in CHAINS:
        known = ", ".join(map(str, CHAINS))
        yield RefusedFlag("--speculative-algorithm", f"one of {known}", repr(algorithm))
    elif release not in VERIFIED_WITH_SPECULATION:
        served = " or ".join(VERIFIED_WITH_SPECULATION)
        yield RefusedFlag("--speculative-algorithm", f"SGLang {served}", release)
    elif algorithm not in VERIFIED_WITH_SPECULATION[release]:
        expected = f"{' or '.join(VERIFIED_WITH_SPECULATION[release])}, which a GPU has served,"
        yield RefusedFlag("--speculative-algorithm", expected, algorithm)
    breadth, topk = args.speculative_ngram_max_bfs_breadth, args.speculative_eagle_topk
    if algorithm == NGRAM and breadth != 1:
        got, remedy = f"{breadth}, a tree", "add the flag with 1"
        yield RefusedFlag("--speculative-ngram-max-bfs-breadth", CHAIN, got, remedy)
    if algorithm in WITH_DRAFT_MODEL and topk not in (None, 1):
        got, remedy = f"{topk}, a tree", "add it with 1, and --speculative-num-steps"
        yield RefusedFlag("--speculative-eagle-topk", CHAIN, got, remedy)
    drafting = args.speculative_draft_attention_backend
    if algorithm in WITH_DRAFT_MODEL and drafting not in DRAFTING_BACKENDS:
        known, default = " or ".join(DRAFTING_BACKENDS), default_dense_backend()
        best = default if default in DRAFTING_BACKENDS else DRAFTING_BACKENDS[0]
        got, remedy = repr(drafting), f"add it with {best}: drafts are made densely"
        yield RefusedFlag("--speculative-draft-attention-backend", known, got, remedy)
