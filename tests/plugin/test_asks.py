"""What requests may ask for, by what their server computes."""

import pytest

from kascade_kernels.budget import Budget
from kascade_sglang.asks import EVERYTHING, Ask, AskReader, kind_of
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError
from tests.support.models import make_plan

BOTH, OWN, PREFILL = frozenset({"prefill", "decode"}), Budget(0.1, 256), Budget(0.1, 512)


def reader(phases: frozenset[str] = BOTH, **changes: object) -> AskReader:
    config = KascadeConfig(make_plan(), OWN, "per_head", prefill=PREFILL, **changes)
    return AskReader(config, phases, context=8192)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, None),
        ({"phases": "both", "min_k": None}, None),
        ({"topk_ratio": 0.1, "min_k": 256}, None),
        ({"topk_ratio": 0.05}, Ask(Budget(0.05, 512), Budget(0.05, 256))),
        ({"prefill_topk_ratio": 0.02}, Ask(Budget(0.02, 512), OWN)),
        ({"min_k": 800}, Ask(PREFILL, Budget(0.1, 800))),
        ({"topk_ratio": 1, "min_k": 64}, Ask(EVERYTHING, EVERYTHING)),
        ({"phases": "none"}, Ask(EVERYTHING, EVERYTHING)),
        ({"phases": "decode", "topk_ratio": 0.05}, Ask(EVERYTHING, Budget(0.05, 256))),
    ],
    ids=str,
)
def test_what_is_left_out_is_the_server_s(asked: dict[str, object], expected: Ask | None) -> None:
    assert reader().read(asked) == expected


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"min_k": 256}, "nothing"),
        ({"phases": "both"}, "nothing"),
        ({"phases": "none"}, "dense"),
        ({"topk_ratio": 1}, "dense"),
        ({"phases": "decode", "min_k": None}, "phases"),
        ({"phases": "decode", "topk_ratio": 0.05}, "budget"),
        ({"prefill_topk_ratio": 1}, "budget"),
    ],
    ids=str,
)
def test_requests_are_counted_by_what_they_come_to(asked: dict[str, object], kind: str) -> None:
    assert kind_of(asked, reader().read(asked)) == kind


@pytest.mark.parametrize("kind", ["dense", "budget"])
def test_a_server_without_sparse_prefill_counts_alike(kind: str) -> None:
    asked = {"phases": "none"} if kind == "dense" else {"topk_ratio": 0.05}
    assert kind_of(asked, reader(phases=frozenset({"decode"})).read(asked)) == kind


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"topk_ratio": True}, r"topk_ratio: expected a number in \(0, 1\], got True"),
        ({"prefill_topk_ratio": 0}, r"prefill_topk_ratio: expected a number in \(0, 1\], got 0"),
        ({"min_k": 9.5}, "min_k: expected a whole number"),
        ({"topk_ratio": "0.2"}, r"(?<!_)topk_ratio: expected a number in \(0, 1\], got '0.2'"),
        (
            {"min_k": 820},
            r"(?<!_)min_k: expected at most 819 keys .* in decode, got 820; ask for less",
        ),
        ({"min_k": 2**31 - 1}, r"(?<!_)min_k: expected at most 819 keys .* got 2147483647; ask"),
        ({"topk_ratio": 0.11}, r"(?<!_)topk_ratio: expected .* in prefill, got 901; ask for less"),
        ({"prefill_topk_ratio": 0.5, "prefill_min_k": 64}, "prefill_topk_ratio and prefill_min_k:"),
        ({"phases": ["none"]}, "phases: expected one of 'both', 'decode', 'none'"),
        ({"phases": "decode", "prefill_min_k": 64}, "prefill_min_k: expected no budget where"),
        ({"plan": "other.json"}, "unknown 'plan'; a request may ask for phases"),
        ([], "expected an object like"),
    ],
    ids=str,
)
def test_what_may_not_be_asked(asked: object, sentence: str) -> None:
    with pytest.raises(KascadeError, match=f"^custom_params.kascade: .*{sentence}"):
        reader().read(asked)


def test_lists_may_be_as_long_as_the_server_reserves() -> None:
    asked, more = {"topk_ratio": 0.3}, reader(max_ratio=0.3)
    assert more.read(asked) == Ask(Budget(0.3, 512), Budget(0.3, 256))
    with pytest.raises(KascadeError, match="--kascade-max-topk-ratio"):
        more.read({"topk_ratio": 0.31})


@pytest.mark.parametrize("by", ["phases", "config"])
def test_a_server_with_a_dense_prefill(by: str) -> None:
    found = reader(frozenset({"decode"}))
    if by == "config":
        config = KascadeConfig(make_plan(), OWN, "per_head", prefill=PREFILL, phases="decode")
        found = AskReader(config, BOTH, context=8192)
    assert found.read({"phases": "decode"}) is None
    assert found.read({"min_k": 300}) == Ask(EVERYTHING, Budget(0.1, 300))
    with pytest.raises(KascadeError, match="phases: expected no more than this server's"):
        found.read({"phases": "both"})


def test_keys_differ_where_budgets_do() -> None:
    budgets = [OWN, PREFILL, EVERYTHING, Budget(0.2, 256)]
    asks = {Ask(first, second) for first in budgets for second in budgets}
    assert len({ask.key for ask in asks}) == len(asks) == 16


@pytest.mark.parametrize("params", ['{"kascade": {"phases": "none"}}', [{}], 5, True], ids=str)
def test_params_that_are_no_object_are_refused(params: object) -> None:
    with pytest.raises(KascadeError, match="^custom_params: expected an object like"):
        reader().check(params)
    for fine in (None, {}, {"another": 5}):
        reader().check(fine)
