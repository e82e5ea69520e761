"""Make a chain of what n-grams propose, under ``--speculative-algorithm NGRAM``.

Why: kascade verifies chains. With a breadth of 1 SGLang still proposes trees: continuations of
    shorter matches branch off, and what pads a tree are children of its root.
How: after the corpus has proposed trees, keep the longest path of each, and pad it at its end.
    Registered when a kascade backend is built that verifies n-grams.
Remove when: a breadth of 1 means a chain, or kascade verifies trees.
"""

from typing import Any

import numpy as np

TARGET = "sglang.srt.speculative.cpp_ngram.ngram_corpus.NgramCorpus.batch_get"
KIND = "AFTER"

PADDING = 0
"""SGLang's: a token like any other, which is accepted where the model says it, too."""


def hook(
    proposed: tuple[np.ndarray, np.ndarray], corpus: Any, *arguments: object, **named: object
) -> tuple[np.ndarray, np.ndarray]:
    """Return drafts and masks of the same shapes and types.

    proposed: drafts, [requests * n] tokens, and masks, [requests * n * n], where node i of a
        request has a 1 at each of its ancestors, all of lower numbers, and at itself.
    """
    drafts, masks = proposed
    count = corpus.draft_token_num
    trees = masks.reshape(-1, count, count) != 0
    chains = np.full_like(drafts.reshape(-1, count), PADDING)
    for chain, tokens, tree in zip(chains, drafts.reshape(-1, count), trees, strict=True):
        # The first of the deepest nodes.
        path = tree[tree.sum(axis=1).argmax()]
        chain[: path.sum()] = tokens[path]
    mask = np.tri(count, dtype=masks.dtype)
    return chains.reshape(drafts.shape), np.tile(mask, (len(chains), 1)).reshape(masks.shape)
