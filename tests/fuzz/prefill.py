"""Tiles: scores, selection and attention, each against its definition."""

import math
import random

import torch

from kascade_kernels import reference
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import TILE, tile_of
from kascade_kernels.codes import encode
from kascade_kernels.launch import EDGE
from kascade_kernels.select_slots import CodeBuffer, count_high, select_slots
from kascade_kernels.structs import KeyCopy, Lists
from kascade_kernels.tile_attention import tile_attention
from kascade_kernels.tile_lse import tile_lse
from kascade_kernels.tile_scores import tile_scores
from tests.fuzz.cases import (
    LONG,
    SHAPES,
    Attended,
    Findings,
    Requests,
    Shape,
    copy_of,
    draw_counts,
)
from tests.support.shapes import DEVICE
from tests.support.tile_case import TileCase

LSE_STRIDE = 4


def prefill(draw: random.Random) -> int:
    """Check a launch over the last tiles of some requests; returns how many requests."""
    shape = draw.choice(SHAPES)
    requests = Requests.draw(draw, shape)
    tokens = [min(n, draw.choice((1, 32, draw.randint(1, 100)))) for n in requests.lengths]
    case = TileCase(
        requests.queries(draw, shape, tokens),
        requests.k,
        requests.v,
        requests.table,
        _places(requests, tokens),
        shape.dim**-0.5,
    )
    counts = [
        draw_counts(draw, TILE * tile_of(end - 1), shape.lists) for _, end, _, _ in case.places
    ]
    lists = _lists(counts)
    head_map = [draw.randrange(shape.lists) for _ in range(shape.kv_heads)]
    copy = copy_of(requests) if shape.eight_bit else None
    lse, buffer = _score(case, lists, shape, copy)
    select_slots(buffer, case.req_to_token, case.rows, lists, append_own=False)
    mapped = torch.tensor(head_map, dtype=torch.int32, device=DEVICE)
    where = (case.req_to_token, case.rows, lists, mapped, case.scale)
    out = tile_attention(case.q, case.k, case.v, *where)
    findings = Findings()
    of_request = {row: index for index, row in enumerate(requests.rows)}
    for row, (table_row, _, first, count) in enumerate(case.places):
        request = of_request[table_row]
        slots = case.slots_of(row)
        selected = _check_lists(findings, row, buffer, slots, lists, counts[row])
        error = requests.logit_error(request, case.queries_of(row), case.scale)
        own_out = out[first : first + count]
        _check_attention(findings, case, row, own_out, selected, head_map, error)
        if requests.logits[request] == "nan":
            continue
        if copy is None:
            _check_scores(findings, case, row, buffer, counts[row], shape, error)
        else:
            if requests.logits[request] != "infinite":  # A key left out would be +inf less inf.
                _check_sampled(findings, case, row, lse, counts[row], error)
            _check_eight_bit(findings, case, row, lse, copy, buffer, counts[row], shape)
    findings.require()
    return len(requests.lengths)


def _places(requests: Requests, tokens: list[int]) -> list[tuple[int, int, int, int]]:
    """Row of the table, end, first query and queries of each tile."""
    places, first = [], 0
    for row, length, count in zip(requests.rows, requests.lengths, tokens, strict=True):
        start = length - count
        while start < length:
            end = min(TILE * (tile_of(start) + 1), length)
            places.append((row, end, first, end - start))
            first, start = first + end - start, end
    return places


def _lists(counts: list[list[int]]) -> Lists:
    """Lists so long, with room for more; their slots are none."""
    held = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    slots = torch.full((held.numel() * LONG,), -1, dtype=torch.int32, device=DEVICE)
    return Lists(slots, torch.arange(held.numel(), device=DEVICE).view_as(held) * LONG, held)


def _score(
    case: TileCase, lists: Lists, shape: Shape, copy: KeyCopy | None
) -> tuple[torch.Tensor, CodeBuffer]:
    where = (case.req_to_token, case.rows, lists)
    stride = 1 if copy is None else LSE_STRIDE
    lse = tile_lse(case.q, case.k, *where, case.scale, stride=stride, max_end=LONG)
    buffer = CodeBuffer.allocate(len(case.places), shape.lists, LONG, empty_on(DEVICE))
    keys = case.k if copy is None else copy
    tile_scores(case.q, keys, *where, lse, case.scale, pooled=shape.pooled, out=buffer.codes)
    count_high(buffer, case.rows, lists)
    return lse, buffer


def _check_lists(
    findings: Findings,
    row: int,
    buffer: CodeBuffer,
    slots: torch.Tensor,
    lists: Lists,
    counts: list[int],
) -> list[torch.Tensor]:
    """Lists are the Top-k of the codes, however these came about; returns them."""
    candidates, selected = TILE * tile_of(len(slots) - 1), []
    for index, count in enumerate(counts):
        at = (row * len(counts) + index) * LONG
        found = lists.slots[at : at + count].long()
        best = slots[:candidates]
        if count < candidates:
            codes = buffer.codes[row, index : index + 1, :candidates].int()
            best = reference.select_slots(codes, slots, count)[0]
        findings.expect(f"row {row} list {index}: the Top-k of its codes", found == best)
        findings.expect(f"row {row} list {index}: no more", lists.slots[at + count : at + LONG] < 0)
        selected.append(best)
    return selected


def _off(
    buffer: CodeBuffer, row: int, scores: torch.Tensor, counts: list[int]
) -> list[torch.Tensor]:
    """How far codes are from those of the scores, of each list that has some."""
    candidates = scores.shape[1]
    return [
        (buffer.codes[row, index, :candidates].int() - encode(scores[index])).abs()
        for index, count in enumerate(counts)
        if count < candidates
    ]


def _check_scores(
    findings: Findings,
    case: TileCase,
    row: int,
    buffer: CodeBuffer,
    counts: list[int],
    shape: Shape,
    error: torch.Tensor,
) -> None:
    scores = case.scores(row)
    scores = reference.pool_heads(scores) if shape.pooled else scores
    for off in _off(buffer, row, scores, counts):
        findings.expect(f"row {row}: codes of the scores", off <= 1 + (4096 * error).floor())


def _check_sampled(
    findings: Findings,
    case: TileCase,
    row: int,
    lse: torch.Tensor,
    counts: list[int],
    error: torch.Tensor,
) -> None:
    """Log-sum-exps of the keys that are read, each for as many as it stands for."""
    end = case.places[row][1]
    own = TILE * tile_of(end - 1)
    weight = torch.zeros(end, dtype=torch.float64)
    middle = weight[EDGE : max(EDGE, own - EDGE)]
    read = torch.arange(len(middle)) % LSE_STRIDE == 0
    middle[~read] = -math.inf
    middle[read] = math.log2(len(middle) / max(int(read.sum()), 1)) if len(middle) else 0.0
    exact = case.exact_lse(row, weight.to(DEVICE))
    for index, count in enumerate(counts):
        heads = slice(None) if len(counts) == 1 else slice(index, index + 1)
        if count < own:
            off = (lse[row, heads, : exact.shape[1]] - exact[heads].float()).abs()
            findings.expect(f"row {row}: log-sum-exps", off <= 1e-4 + 4 * error)


def _check_eight_bit(
    findings: Findings,
    case: TileCase,
    row: int,
    lse: torch.Tensor,
    copy: KeyCopy,
    buffer: CodeBuffer,
    counts: list[int],
    shape: Shape,
) -> None:
    """Codes are those of rounded queries and keys; a GPU may round two numbers the other way."""
    q = case.queries_of(row).unflatten(1, (shape.kv_heads, shape.group))
    q = q.transpose(0, 1).flatten(1, 2).float()
    rounded, steps = [], []
    for block in q.split(128, dim=1):
        step = block.abs().amax((1, 2), keepdim=True) / 127
        rounded.append((block / step + 0.5).floor().double() * step)
        steps.append(step.amax())
    candidates = TILE * tile_of(case.places[row][1] - 1)
    slots = case.slots_of(row)[:candidates]
    keys = copy.values[slots].double() * copy.scales[slots].double().unsqueeze(-1)
    to_base_2 = case.scale / math.log(2)
    logits = torch.einsum("hrd,lhd->hrl", torch.cat(rounded, 1), keys) * to_base_2
    mass = (logits - lse[row, :, : q.shape[1], None].double()).exp2().sum(1)
    mass = reference.pool_heads(mass) if shape.pooled else mass
    largest = keys.abs().where(keys.abs() < reference.LOGIT_BOUND, 0.0)
    off_by = 2 * torch.stack(steps).amax() * to_base_2 * largest.amax() if candidates else 0.0
    for off in _off(buffer, row, mass, counts):
        findings.expect(f"row {row}: codes of rounded keys", off <= 16 + 1024 * off_by)


def _check_attention(
    findings: Findings,
    case: TileCase,
    row: int,
    out: torch.Tensor,
    selected: list[torch.Tensor],
    head_map: list[int],
    error: torch.Tensor,
) -> None:
    slots, group = case.slots_of(row), case.q.shape[1] // case.k.shape[1]
    own, q = slots[TILE * tile_of(len(slots) - 1) :], case.queries_of(row)
    for head, source in enumerate(head_map):
        of, k, v = slice(head * group, (head + 1) * group), case.k[:, [head]], case.v[:, [head]]
        attended = Attended(q[:, of], k, v, selected[source], own, case.scale, out[:, of])
        attended.check(findings, f"row {row} head {head}: attention", error)
