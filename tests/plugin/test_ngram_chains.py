"""What n-grams propose becomes chains, by the hook on SGLang's corpus."""

from types import SimpleNamespace

import numpy as np
import pytest

from kascade_patches import ngram_batch_get

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
