"""What the serving benchmark sends: SGLang's own data sets, with exact lengths."""

import pickle
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

K = 1024
SEED = 1


class Workload(NamedTuple):
    """Requests of one run, and the figure that users decide by.

    inputs, outputs: tokens of each request; a RAG request's inputs are ``prefix`` shared by the
    requests of its group and its own. figure: column of the results; must: least ratio to the
    best of SGLang's own backends, 0 where the row only makes a curve. arrivals: share of fa3's
    throughput with all sent at once, the workload ``NAME-limit``, at which requests arrive, as a
    Poisson process; None sends all at once.
    warmups: requests before those timed.
    """

    requests: int
    inputs: int
    outputs: int
    figure: str
    must: float
    prefix: int = 0
    groups: int = 0
    arrivals: float | None = None
    warmups: int = 0
    turns: int = 1

    @property
    def replies(self) -> int:
        """How many replies a run has."""
        return self.requests * self.turns

    def arguments(self) -> list[str]:
        """Return the options of SGLang's client that make these requests."""
        if not self.groups:
            return [
                *("--dataset-name", "random-ids", "--tokenize-prompt"),
                *("--random-input-len", str(self.inputs)),
                *("--random-output-len", str(self.outputs)),
                *("--random-range-ratio", "1", "--num-prompts", str(self.requests)),
            ]
        return [
            *("--dataset-name", "generated-shared-prefix", "--gsp-range-ratio", "1"),
            *("--gsp-num-groups", str(self.groups)),
            *("--gsp-prompts-per-group", str(self.requests // self.groups)),
            *("--gsp-system-prompt-len", str(self.prefix)),
            *("--gsp-question-len", str(self.inputs - self.prefix)),
            *("--gsp-output-len", str(self.outputs), "--num-prompts", str(self.requests)),
            *("--seed", str(SEED), "--gsp-num-turns", str(self.turns)),
        ]

    def write_prompts(self, model: Path) -> None:
        """Tokenise the prompts that share a prefix, before anything is timed.

        A server turns one text after the other into tokens, so that many long ones at once would
        wait longer for that than for the GPU. SGLang's client finds the prompts where it keeps
        those that it has made, below HOME.
        """
        from sglang.benchmark.datasets import generated_shared_prefix as data
        from sglang.benchmark.utils import get_tokenizer

        tokenizer = get_tokenizer(str(model))
        sizes = {
            "num_groups": self.groups,
            "prompts_per_group": self.requests // self.groups,
            "system_prompt_len": self.prefix,
            "question_len": self.inputs - self.prefix,
            "output_len": self.outputs,
            "tokenizer": tokenizer,
        }
        path = data.get_gen_prefix_cache_path(SEED, **sizes)
        if path.exists():
            return
        random.seed(SEED)
        np.random.seed(SEED)
        requests = data.sample_generated_shared_prefix_requests(seed=SEED, range_ratio=1, **sizes)
        for request in requests:
            request.prompt = tokenizer.encode(request.prompt)
        path.write_bytes(pickle.dumps(requests))


WARM_UP = Workload(4, 2 * K + 64, 8, "", 0.0, 2 * K, 1)
WARM_UP_RATE = 1.0
"""Sent to every server first, at that many requests a second: the first ones find no prefix, the
later ones do, so that the kernels of both are compiled."""
WORKLOADS = {
    "decode-8x32K": Workload(8, 32 * K, 256, "itl_p50_ms", 2.0),
    "decode-3x128K": Workload(3, 128 * K, 256, "itl_p50_ms", 2.0),
    "prefill-128K": Workload(1, 128 * K, 8, "ttft_p50_ms", 1.5, warmups=1),
    "prefill-32K": Workload(1, 32 * K, 8, "ttft_p50_ms", 1.15, warmups=1),
    "rag-one-prefix": Workload(32, 32 * K + 512, 256, "output_tokens_per_s", 2.5, 32 * K, 1),
    "rag-8-prefixes-limit": Workload(64, 16 * K + 512, 256, "output_tokens_per_s", 1.2, 16 * K, 8),
    "rag-8-prefixes": Workload(64, 16 * K + 512, 256, "ttft_p99_ms", 1.2, 16 * K, 8, 0.8),
    "conversations": Workload(6, 20 * K + 512, 256, "output_tokens_per_s", 1.8, 20 * K, 6, turns=5),
    "chat": Workload(64, K, 256, "output_tokens_per_s", 0.97),
    "reasoning": Workload(16, 2 * K, 8 * K, "output_tokens_per_s", 1.05),
    "host": Workload(1, K, 8 * K, "itl_p50_ms", 0.95),
    **{f"prefill-{n}K": Workload(1, n * K, 8, "ttft_p50_ms", 0, warmups=1) for n in (4, 16, 64)},
    **{f"decode-8x{n}K": Workload(8, n * K, 128, "itl_p50_ms", 0) for n in (2, 8)},
    "decode-8x128K": Workload(8, 128 * K, 128, "itl_p50_ms", 0),
    **{f"decode-{n}x32K": Workload(n, 32 * K, 128, "itl_p50_ms", 0) for n in (1, 2, 4)},
}
TARGETS = [name for name, workload in WORKLOADS.items() if workload.must and name != "host"]
"""What is run where nothing is named. ``host`` is for the model ``four-layers``."""


def medians(rows: pd.DataFrame, workload: Workload) -> dict[str, float]:
    """Return the workload's figure under each backend: the median of its rows."""
    return rows.groupby("backend", sort=False)[workload.figure].median().to_dict()


def compare(found: dict[str, float], workload: Workload) -> tuple[str, float]:
    """Return the best backend beside kascade, and by how much kascade is better than it.

    found: the workload's figure under each backend; times are better when lower.
    """
    ours, others = found["kascade"], {key: found[key] for key in found if key != "kascade"}
    if workload.figure.endswith("_ms"):
        best = min(others, key=others.get)
        return best, others[best] / ours
    best = max(others, key=others.get)
    return best, ours / others[best]
