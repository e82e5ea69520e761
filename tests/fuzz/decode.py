"""Decode rows: lengths of lists, scores, selection and attention, each against its definition."""

import random

import torch

from kascade_kernels import reference
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import Budget
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.decode_lists import Budgets, Spans, decode_lists
from kascade_kernels.decode_scores import ScoreScratch
from kascade_kernels.merge_parts import Parts
from kascade_kernels.select_slots import select_slots
from kascade_kernels.structs import KeyCopy, Lists, Rows
from kascade_kernels.tuning import STEP
from tests.fuzz.cases import (
    LONG,
    SHAPES,
    SPREADS,
    Attended,
    Findings,
    Requests,
    Shape,
    candidates_of,
    copy_of,
    draw_counts,
)
from tests.support.decode_case import DecodeCase
from tests.support.shapes import DEVICE

EIGHT_BIT_LOSS = 0.15
"""Share of the best mass that a few keys picked by rounded numbers may miss, for usual logits."""
UNSEEN_MASS = 2.0**-47
"""Masses that codes do not tell from zero are below half of it."""


def decode(draw: random.Random) -> int:
    """Check a step of one new query a request; returns how many requests."""
    shape = draw.choice(SHAPES)
    requests = Requests.draw(draw, shape)
    case = _case(draw, requests, shape)
    budget = Budget(draw.choice((0.05, 0.1, 0.3, 1.0)), draw.choice((64, 80, 128, 4096)))
    findings = Findings()
    lists, spans = _lists(draw, case, budget, shape, findings)
    dense, codes = _select(case, lists, spans, shape, case.k, case.v)
    selected = lists.slots.clone()
    keys = copy_of(requests) if shape.eight_bit else case.k
    _, other_codes = _select(case, lists, spans, shape, keys, None)
    head_map = [draw.randrange(shape.lists) for _ in range(shape.kv_heads)]
    out = decode_attention(
        case.q, case.k, case.v, lists, spans, torch.tensor(head_map, dtype=torch.int32).to(DEVICE),
        case.scale, Parts.allocate(spans, case.q.shape[1], shape.dim),
    )  # fmt: skip
    held = lists.counts.tolist()
    for row, logits in enumerate(requests.logits):
        own = case.slots_of(row)[candidates_of(case.lengths[row]) :]
        first = _check_lists(findings, case, row, codes, selected, held[row], own)
        then = _check_lists(findings, case, row, other_codes, lists.slots, held[row], own)
        error = requests.logit_error(row, case.q[row], case.scale)
        if logits != "nan":
            _check_mass(findings, case, row, shape, first, 1e-3 + 4 * error)
            if not shape.eight_bit:
                _check_mass(findings, case, row, shape, then, 1e-3 + 4 * error)
            elif logits in ("usual", "flat"):
                _check_mass(findings, case, row, shape, then, torch.tensor(EIGHT_BIT_LOSS))
        every = [case.slots_of(row)] * shape.kv_heads
        listed = [torch.cat([then[source], own]) for source in head_map]
        for name, found, keys in (("to all keys", dense, every), ("to lists", out, listed)):
            _check_attention(findings, case, row, found[row], keys, name, error)
    findings.require()
    return len(requests.lengths)


def _case(draw: random.Random, requests: Requests, shape: Shape) -> DecodeCase:
    table_rows = torch.tensor(requests.rows, device=DEVICE)
    if draw.random() < 0.5:
        _share(draw, requests)
    q = requests.queries(draw, shape, [1] * len(requests.lengths))
    rows = Rows(table_rows, torch.tensor(requests.lengths, device=DEVICE))
    lengths = requests.lengths
    scale = shape.dim**-0.5
    return DecodeCase(q, requests.k, requests.v, requests.table, rows, lengths, scale)


def _share(draw: random.Random, requests: Requests) -> None:
    """Let some requests begin with the same slots; not those whose keys are changed later."""
    usual = [n for n, logits in enumerate(requests.logits) if logits in SPREADS]
    for _ in range(2 if len(usual) > 1 else 0):
        some = draw.sample(usual, draw.randint(2, min(len(usual), 20)))
        shared = draw.randint(1, min(requests.lengths[n] for n in some))
        first = requests.slots(some[0])[:shared].to(torch.int32)
        for n in some:
            requests.table[requests.rows[n], :shared] = first


def _lists(
    draw: random.Random, case: DecodeCase, budget: Budget, shape: Shape, findings: Findings
) -> tuple[Lists, Spans]:
    """Lists as long as the budget says, or of any length; slots are none."""
    rows, heads, invariant = len(case.lengths), shape.kv_heads, shape.batch_invariant
    spans = Spans.allocate(rows, heads, DEVICE, batch_invariant=invariant)
    counts = torch.empty(rows, shape.lists, dtype=torch.int32, device=DEVICE)
    budgets = [budget] * rows
    given = Budgets.of(budgets, DEVICE)
    decode_lists(case.rows.ends, heads, given, spans, counts, batch_invariant=invariant)
    wanted = reference.decode_lists(case.lengths, budgets)
    wanted = torch.tensor(wanted, device=DEVICE)[:, None].expand_as(counts)
    findings.expect("lengths of lists", counts == wanted)
    if draw.random() < 0.5:
        drawn = [
            [n + case.own(row) for n in draw_counts(draw, candidates_of(length), shape.lists)]
            for row, length in enumerate(case.lengths)
        ]
        counts.copy_(torch.tensor(drawn, dtype=torch.int32))
        # Spans must have room for the lists, and those of the budget do for its own alone.
        room = STEP * spans.attend_splits
        spans.attend.copy_(spans.attend.maximum((counts.amax(1) + room - 1) // room))
    offsets = torch.arange(counts.numel(), device=DEVICE).view_as(counts) * LONG
    slots = torch.full((counts.numel() * LONG,), -1, dtype=torch.int32, device=DEVICE)
    return Lists(slots, offsets, counts), spans


def _select(
    case: DecodeCase,
    lists: Lists,
    spans: Spans,
    shape: Shape,
    keys: torch.Tensor | KeyCopy,
    values: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Fill the lists; returns attention to every key where there are values, and the codes."""
    rows, q_heads, dim = case.q.shape
    scratch = ScoreScratch.allocate(rows, q_heads, shape.lists, LONG, empty_on(DEVICE))
    parts = Parts.allocate(spans, q_heads, dim)
    out = case.score(keys, spans, lists, scratch, parts, values)
    select_slots(scratch.codes, case.req_to_token, case.rows, lists, append_own=True)
    return out, scratch.codes.codes


def _check_lists(
    findings: Findings,
    case: DecodeCase,
    row: int,
    codes: torch.Tensor,
    slots: torch.Tensor,
    counts: list[int],
    own: torch.Tensor,
) -> list[torch.Tensor]:
    """Lists are the Top-k of the codes and the own tile; returns the former."""
    candidates, selected = candidates_of(case.lengths[row]), []
    for index, held in enumerate(counts):
        at, count = (row * len(counts) + index) * LONG, held - len(own)
        best = case.slots_of(row)[:candidates]
        if count < candidates:
            of_list = codes[row, index : index + 1, :candidates].int()
            best = reference.select_slots(of_list, best, count)[0]
        found = slots[at : at + held].long()
        findings.expect(f"row {row} list {index}: Top-k, own tile", found == torch.cat([best, own]))
        findings.expect(f"row {row} list {index}: no more", slots[at + held : at + LONG] < 0)
        selected.append(best)
    return selected


def _check_mass(
    findings: Findings,
    case: DecodeCase,
    row: int,
    shape: Shape,
    selected: list[torch.Tensor],
    loss: torch.Tensor,
) -> None:
    """Keys of +inf come first, and of the others no mass is lost beyond a share."""
    scores, slots = case.scores(row, shape.pooled), case.slots_of(row)
    candidates = slots[: scores.shape[1]]
    for index, chosen in enumerate(selected):
        if not 0 < len(chosen) < len(candidates):
            continue
        own, taken = scores[index], torch.isin(candidates, chosen)
        infinite = own.isinf()
        missed = (infinite & ~taken).any() & (taken & ~infinite).any()
        findings.expect(f"row {row} list {index}: +inf first", ~missed)
        finite = own.masked_fill(infinite, 0.0)
        rest = torch.arange(len(own), device=DEVICE) < len(chosen) - infinite.sum()
        best = finite.sort(descending=True).values[rest].sum()
        lost = best - finite[taken].sum()
        allowed = loss.to(DEVICE) * best + len(chosen) * UNSEEN_MASS
        findings.expect(f"row {row} list {index}: mass", lost <= allowed)


def _check_attention(
    findings: Findings,
    case: DecodeCase,
    row: int,
    out: torch.Tensor,
    keys: list[torch.Tensor],
    name: str,
    error: torch.Tensor,
) -> None:
    group = case.q.shape[1] // case.k.shape[1]
    for head, slots in enumerate(keys):
        of, k, v = slice(head * group, (head + 1) * group), case.k[:, [head]], case.v[:, [head]]
        q, none = case.q[None, row, of], slots[:0]
        attended = Attended(q, k, v, slots, none, case.scale, out[None, of])
        attended.check(findings, f"row {row} head {head}: attention {name}", error)
