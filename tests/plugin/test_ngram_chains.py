"""What n-grams propose becomes chains, by the hook on SGLang's corpus."""

from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kascade_patches import OF_NGRAM, hook_now, ngram_batch_get
from kascade_sglang.host.release import VERIFIED_WITH_SPECULATION
from kascade_sglang.host.server import require_hooks

ALONE = -1
"""The parent of a root."""
PARENTS = [
    # Two branches of the root, in the order of breadth that SGLang has; the second goes deeper.
    [ALONE, 0, 0, 1, 2, 4],
    # Nothing to continue by: padding, which are all children of the root.
    [ALONE, 0, 0, 0, 0, 0],
    # A chain already.
    [ALONE, 0, 1, 2, 3, 4],
    # A fork behind two tokens: the first of two paths of one length.
    [ALONE, 0, 1, 2, 2, 0],
]
DRAFTS = np.array(
    [
        [10, 11, 12, 13, 14, 15],
        [20, 0, 0, 0, 0, 0],
        [30, 31, 32, 33, 34, 35],
        [40, 41, 42, 43, 44, 0],
    ]
)
CHAINS = [
    [10, 12, 14, 15, 0, 0],
    [20, 0, 0, 0, 0, 0],
    [30, 31, 32, 33, 34, 35],
    [40, 41, 42, 43, 0, 0],
]


def mask_of(parents: list[int]) -> np.ndarray:
    """A node's ancestors and itself: int [n, n]."""
    mask = np.eye(len(parents), dtype=np.int64)
    for node, parent in enumerate(parents):
        if parent != ALONE:
            mask[node] |= mask[parent]
    return mask


@pytest.mark.parametrize("dtype", [np.int64, np.bool_], ids=str)
def test_the_longest_path_is_kept_and_padded_at_its_end(dtype: type) -> None:
    masks = np.concatenate([mask_of(parents).ravel() for parents in PARENTS]).astype(dtype)
    corpus = SimpleNamespace(draft_token_num=6)
    before = DRAFTS.copy()
    drafts, found = ngram_batch_get.hook((DRAFTS.ravel(), masks), corpus, ["a"], [[1]], [1])
    assert drafts.reshape(4, 6).tolist() == CHAINS and drafts.dtype == DRAFTS.dtype
    assert found.dtype == dtype and found.shape == masks.shape
    for mask in found.reshape(4, 6, 6):
        assert np.array_equal(mask, mask_of([ALONE, 0, 1, 2, 3, 4]))
    assert np.array_equal(DRAFTS, before)


@pytest.fixture
def corpus_class() -> Iterator[Any]:
    """SGLang's, as it is once a backend that verifies n-grams has been built; twice, here."""
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus

    original = NgramCorpus.batch_get
    hook_now(OF_NGRAM)
    require_hooks(hook_now(OF_NGRAM))
    yield NgramCorpus
    NgramCorpus.batch_get = original
    HookRegistry._hooks.pop(ngram_batch_get.TARGET)
    HookRegistry._patched.discard(ngram_batch_get.TARGET)


@pytest.mark.skipif(
    version("sglang") not in VERIFIED_WITH_SPECULATION, reason="refused on this release"
)
def test_sglang_s_corpus_proposes_chains(corpus_class: Any) -> None:
    """What is compiled when a server starts is a stand-in here."""
    masks = np.concatenate([mask_of(parents).ravel() for parents in PARENTS])
    asked = []

    def match(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        asked.append(arguments)
        return DRAFTS.ravel(), masks

    corpus = object.__new__(corpus_class)
    corpus.draft_token_num, corpus._obj = 6, SimpleNamespace(match_stateful=match)
    corpus._req_id_to_state_id, corpus._next_state_id = {}, 0
    drafts, _ = corpus.batch_get(["a", "b", "c", "d"], [[1]] * 4, [1] * 4)
    assert drafts.reshape(4, 6).tolist() == CHAINS and len(asked) == 1
