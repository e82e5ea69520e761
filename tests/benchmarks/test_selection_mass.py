"""The selection study: its methods against the reference, its inputs and its table."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import attention_inputs as inputs
from benchmarks import selection_mass as study
from kascade_kernels.budget import TILE, Budget
from kascade_kernels.reference import select_topk, tile_scores


def case_of(phase: str, length: int = 1280):
    sizes = inputs.Sizes(tiles=1, positions=1, samples=1)
    found = [case for case in inputs.synthetic(length, sizes) if case.phase == phase]
    return found[-1]


@pytest.fixture(params=["decode", "prefill"])
def case(request: pytest.FixtureRequest):
    return case_of(request.param)


def test_mass_and_scores_are_those_of_the_reference(case) -> None:
    expected = tile_scores(case.q.double(), case.k.double(), case.scale)
    for head, row in enumerate(study.rows_of(case)):
        assert torch.allclose(row.mass.sum(1), torch.ones(len(row.q), dtype=torch.float64))
        torch.testing.assert_close(row.mass[:, : row.own].sum(0), expected[head])
        scores = study.full(row, 96, "fp32")[0].double()
        torch.testing.assert_close(scores, expected[head], rtol=1e-4, atol=1e-7)


def test_methods_without_an_approximation_are_exact(case) -> None:
    for row in study.rows_of(case):
        count = Budget(0.1).selected((len(row.k) - 1) // TILE)
        best = select_topk(row.mass[:, : row.own].sum(0, keepdim=True), count)
        exact = [
            study.sampled(row, count, "fp32", step=1),
            study.some_queries(row, count, step=1),
            study.pages(row, count, page=16, times=row.own),
            study.refined(row, count, study.methods("decode")["int8_kq"], "fp32", times=row.own),
        ]
        for scores in exact:
            assert (select_topk(scores, count) == best).float().mean() > 0.99


def test_no_method_beats_the_exact_selection(case) -> None:
    for row in study.rows_of(case):
        tallies: dict = {}
        study.measure(row, case.phase, tallies)
        assert {method for _, method in tallies} == {"exact", *study.methods(case.phase)}
        for (_, method), tally in tallies.items():
            assert 0 < tally.rows[0] <= 1 + 1e-9, method
            assert len(tally.queries[0]) == len(row.q)
            if method in ("exact", "fp32"):
                assert tally.rows[0] > 1 - 1e-6


def test_pages_keep_no_more_than_they_may(case) -> None:
    row = next(study.rows_of(case))
    scores = study.pages(row, count=96, page=32, times=2)
    assert (scores >= 0).sum() == 192


def test_rounding() -> None:
    x = torch.randn(50, 64)
    most = x.abs().amax(1, keepdim=True)
    assert ((study.round_int(x, 127) - x).abs() <= most / 254 * 1.0001).all()
    assert study.round_fp8(torch.tensor([1e4, -1e4, 0.3])).tolist() == [448, -448, 0.3125]
    y = torch.randn(50, 64)
    torch.testing.assert_close(
        study.hadamard(x) @ study.hadamard(y).T, x @ y.T, rtol=1e-4, atol=1e-4
    )
    x[0, 40] = -math.inf
    rounded = study.half_by_block(x)
    assert rounded[0, 40] == -math.inf
    finite = x.isfinite()
    assert (rounded[finite] - x[finite]).abs().max() < 8 * 2**-11


def test_synthetic_attention_is_as_described() -> None:
    head = inputs.SyntheticHead(1024, seed=0, sink=12)
    spreads = head.k.float().std(0)
    assert (spreads / spreads.median() > 5).sum() == 4
    q = head.queries(992, 32)
    assert torch.equal(q, head.queries(992, 32))
    logits = torch.einsum("ngd,ld->ngl", q, head.k[:992].float()) * head.dim**-0.5
    typical = logits.median(dim=-1).values
    assert 9 < (logits[:, :, 0] - typical).mean() < 15  # the sink
    margins = logits[:, :, 4:].amax(dim=-1) - typical
    assert margins.mean() > 8  # a needle, in most queries


def test_demo_chat_asks_questions() -> None:
    ids, kinds = inputs.demo_chat(2048, seed=0)
    assert len(ids) == len(kinds) <= 2048
    assert sum(kind == inputs.ANSWER for kind in kinds) > 100


def test_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mass.csv"
    small = "--demo --synthetic 768 --tiles 1 --positions 1 --samples 1 --out".split()
    monkeypatch.setattr(sys, "argv", ["selection_mass.py", *small, str(out)])
    study.main()
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == study.COLUMNS
    methods = {phase: {"exact", *study.methods(phase)} for phase in ("decode", "prefill")}
    assert len(rows) == len(study.RATIOS) * sum(map(len, methods.values()))
    for phase, names in methods.items():
        assert {row["method"] for row in rows if row["phase"] == phase} == names
    assert all(row["n"] == "2" for row in rows)
    assert out.with_suffix(".png").stat().st_size > 10_000
