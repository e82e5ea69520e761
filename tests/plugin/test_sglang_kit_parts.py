"""SGLang's attention kit has no part that is neither run nor named with why it does not apply.

``tests/backend/test_sglang_kit.py`` runs the others, on a GPU.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

KIT = "sglang.test.kits.attention_unittest"
RUN = {
    "dense_attention",
    "cuda_graph_decode_runner",
    "metadata_invariants",  # which the captured cases call
    "split_op_runner",
    "speculative_target_verify_runner",
    "speculative_cuda_graph_runner",  # which the captured chains call
}
OTHER_MODELS = "other than softmax attention over K and V of each head, which a plan refuses"
SPECULATIVE = "drafting, which is the dense backend's"
DO_NOT_APPLY = {
    "dsa_attention": OTHER_MODELS,
    "dsv4_attention": OTHER_MODELS,
    "dual_chunk_attention": OTHER_MODELS,
    "gdn_attention": OTHER_MODELS,
    "kda_attention": OTHER_MODELS,
    "lightning_attention": OTHER_MODELS,
    "mamba2_attention": OTHER_MODELS,
    "mla_attention": OTHER_MODELS,
    "speculative_draft_extend_runner": SPECULATIVE,
    "speculative_draft_runner": SPECULATIVE,
}


def test_every_part_is_run_or_named() -> None:
    spec = find_spec(KIT)
    if spec is None:
        pytest.skip("this release of SGLang has no attention kit")
    folder = Path(spec.origin).parent
    parts = {path.stem for path in folder.glob("*/*.py")} - {"__init__"}
    assert parts <= RUN | set(DO_NOT_APPLY)
    assert parts >= RUN and not RUN & set(DO_NOT_APPLY)
