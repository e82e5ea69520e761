"""Rules of selection in prefill, on attention small enough to check by hand."""

import pytest
import torch

from benchmarks.prefill_rules import kept_keys, parse_rule


def attention(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One head, one tile at position 64 and its rows' mass on the 64 keys before it."""
    p = torch.zeros(1, 1, len(rows), 96)
    for row, mass in enumerate(rows):
        p[0, 0, row, : len(mass)] = torch.tensor(mass)
    return p, torch.tensor([64])


def kept(rule: str, rows: list[list[float]]) -> list[int]:
    p, ends = attention(rows)
    return kept_keys(parse_rule(rule), p, ends)[0, 0].nonzero().flatten().tolist()


COMMON = [[0.2, 0.3, 0.1], [0.2, 0.3, 0.1], [0.0, 0.0, 0.0, 0.5]]
"""Two rows share three keys; one row alone wants the fourth."""


def test_a_sum_follows_the_rows_together_a_maximum_each() -> None:
    assert kept("sum+ratio0.1+keys33", COMMON) == [1]
    assert kept("max+ratio0.1+keys33", COMMON) == [3]


def test_reserved_keys_come_before_the_rest() -> None:
    assert kept("reserve1+ratio0.1+keys34", COMMON) == [1, 3]
    assert kept("sum+ratio0.1+keys34", COMMON) == [1, 3]
    assert kept("sum+ratio0.1+keys35", COMMON) == [0, 1, 3]


def test_a_budget_by_mass_is_the_shortest_list_that_loses_no_more() -> None:
    # All candidates hold 1.7 of three rows' mass; 0.2 are lost without the third key.
    assert kept("sum+mass0.93+keys32", COMMON) == [0, 1, 3]
    assert kept("sum+mass0.95+keys32", COMMON) == [0, 1, 2, 3]
    # No row alone may lose a tenth; without the third key, two would lose just that.
    assert kept("sum+rows0.95+keys32", COMMON) == [0, 1, 2, 3]
    assert kept("sum+rows0.85+keys32", COMMON) == [0, 1, 3]


def test_floor_and_ceiling_bound_lists() -> None:
    assert len(kept("sum+mass0.5+floor0.5", COMMON)) == 64  # 128 keys at least, and 64 there are
    assert len(kept("sum+mass0.5+floor0.5+keys32", COMMON)) == 48 - 32
    assert len(kept("max+above0.0001+ceil0.35+keys32", COMMON)) == 33 - 32


def test_windows_and_sinks_are_kept_whatever_their_mass() -> None:
    assert kept("sum+ratio0.1+keys36+window2+sink1", COMMON) == [0, 1, 62, 63]


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'best'"):
        parse_rule("best+ratio0.1")
    with pytest.raises(ValueError, match="got 'ratio'"):
        parse_rule("sum+ratio")
