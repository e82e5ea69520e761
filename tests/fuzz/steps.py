"""Ties of codes, and whole steps against themselves under other schedules."""

import random

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kascade_kernels import reference
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import TILE, Budget
from kascade_kernels.select_slots import CodeBuffer, count_high, select_slots
from kascade_kernels.structs import Rows
from tests.backend.test_backend import assert_same
from tests.fuzz.cases import LONG, ON_GPU, Findings, Requests, Shape, candidates_of, draw_counts
from tests.kernels.test_select_slots import draw_codes
from tests.support.decode_case import DecodeCase
from tests.support.harness import Harness
from tests.support.shapes import DEVICE

LONGEST_SCHEDULE = 700 if ON_GPU else LONG


def ties(draw: random.Random) -> int:
    """Check the selection of drawn codes; returns how many requests."""
    lists = draw.choice((1, 2))
    requests = Requests.draw(draw, Shape(1, 1, 16, torch.float16))
    lengths = requests.lengths
    append_own = draw.random() < 0.5
    # As prefill's are, and decoding's.
    whole = torch.int64 if append_own else torch.int32
    rows = Rows(*(torch.tensor(x, dtype=whole, device=DEVICE) for x in (requests.rows, lengths)))
    case = DecodeCase(requests.k, requests.k, requests.v, requests.table, rows, lengths, 1.0)
    counts = [draw_counts(draw, candidates_of(length), lists) for length in lengths]
    torch.manual_seed(draw.getrandbits(31))
    kinds = ("constant", "few", "extremes", "near", "any")
    codes = torch.cat([draw_codes(draw.choice(kinds), (1, lists, LONG)) for _ in lengths]).to(
        DEVICE
    )
    buffer = CodeBuffer.allocate(len(lengths), lists, LONG, empty_on(DEVICE))
    buffer.codes.copy_(codes.to(torch.uint16))
    count_high(buffer, rows, case.lists(counts, append_own=False))
    selected = case.lists(counts, append_own=append_own)
    select_slots(buffer, requests.table, rows, selected, append_own=append_own)
    findings, room = Findings(), int(selected.offsets.flatten()[-1]) // (len(lengths) * lists - 1)
    for row, length in enumerate(lengths):
        slots, candidates = requests.slots(row), candidates_of(length)
        own = slots[candidates:] if append_own else slots[:0]
        for index, count in enumerate(counts[row]):
            best = reference.select_slots(codes[row, [index], :candidates], slots, count)[0]
            at = (row * lists + index) * room
            found = selected.slots[at : at + count + len(own)].long()
            findings.expect(f"row {row} list {index}", found == torch.cat([best, own]))
    findings.require()
    return len(lengths)


def schedules(draw: random.Random) -> int:
    """Compare requests alone in one chunk with drawn chunks in company; returns how many."""
    lengths = [draw.randint(1, LONGEST_SCHEDULE) for _ in range(draw.randint(2, 3))]
    pooled = draw.random() < 0.5
    options = {
        "kv_heads": 2,
        "group": 4,
        "heads": "pooled" if pooled else "per_head",
        "page_size": draw.choice((1, 16, 32)),
        "exact": pooled,
        "budget": Budget(draw.choice((0.05, 0.1, 0.5)), draw.choice((64, 128))),
        "batch_invariant": True,
        "data_seed": draw.getrandbits(20),
    }
    alone = Harness(lengths, **options)
    for request, end in enumerate(lengths):
        alone.step([(request, 0, end)], ForwardMode.EXTEND)
    other = Harness(lengths, slot_seed=draw.getrandbits(20), score_memory=2**17, **options)
    spoilt = draw.choice((None, draw.randrange(len(lengths))))
    if spoilt is not None:
        for layer in other.qkv:
            draw.choice(layer[spoilt])[draw.randrange(lengths[spoilt])] = float("nan")
    begins = [0] * len(lengths)
    while begins != lengths:
        open_ = [n for n, end in enumerate(lengths) if begins[n] < end]
        spans = []
        for n in draw.sample(open_, draw.randint(1, len(open_))):
            # Chunks end with tiles, as pages do; the last ends with the request.
            end = min(begins[n] + TILE * draw.randint(1, 8), lengths[n])
            spans.append((n, begins[n], end))
            begins[n] = end
        # Single tokens are a prompt's end here, too: decode steps sum in another order.
        other.step(spans, ForwardMode.EXTEND)
    for request in range(len(lengths)):
        if request != spoilt:
            assert_same(alone, other, request)
    return len(lengths)
