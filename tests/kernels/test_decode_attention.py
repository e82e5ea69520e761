"""Decode attention over lists against the float64 reference."""

import math

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.decode_lists import Spans
from kascade_kernels.merge_parts import Parts
from kascade_kernels.structs import Lists
from kascade_kernels.tuning import STEP
from tests.support.decode_case import DecodeCase
from tests.support.shapes import DEVICE, needs_kernels, shapes

pytestmark = needs_kernels


def make_lists(
    counts: list[int] | list[list[int]], per_row: int, slots: int
) -> tuple[Lists, list[list[torch.Tensor]]]:
    """Lists of distinct slots, any order; counts: of each row, or of each of its lists."""
    held = torch.tensor(counts, dtype=torch.int32)
    held = held if held.dim() == 2 else held[:, None].expand(-1, per_row).contiguous()
    drawn = [[torch.randperm(slots)[:n] for n in row] for row in held.tolist()]
    flat = torch.cat([one for row in drawn for one in row]).to(torch.int32)
    offsets = (held.flatten().cumsum(0) - held.flatten()).view_as(held)
    return Lists(flat.to(DEVICE), offsets.to(torch.int64).to(DEVICE), held.to(DEVICE)), drawn


def spans_of(lists: Lists) -> Spans:
    """One to four programs a list."""
    share = (lists.counts.max() + 3) // 4
    steps = ((share + STEP - 1) // STEP).expand(len(lists.counts)).to(torch.int32)
    return Spans(steps.contiguous(), steps.contiguous(), 4, 4)


def eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query over its lists in its own precision, [Hq, D]; slots: [H, count], heads mapped."""
    heads = torch.arange(k.shape[1], device=k.device)[:, None]
    keys, values = k[slots, heads], v[slots, heads]
    grouped = q.view(k.shape[1], -1, q.shape[-1])
    weights = (grouped @ keys.transpose(1, 2) * scale).softmax(-1)
    return (weights @ values).reshape(q.shape)


@shapes
@pytest.mark.memcheck
def test_equals_float64(group: int, dim: int, dtype: torch.dtype) -> None:
    counts = [1, 31, 32, 64, 65, 200]
    case = DecodeCase.make(counts, group=group, dim=dim, dtype=dtype)
    lists, drawn = make_lists(counts, 2, case.k.shape[0])
    head_map = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    spans = spans_of(lists)
    parts = Parts.allocate(spans, case.q.shape[1], dim)
    out = decode_attention(case.q, case.k, case.v, lists, spans, head_map, case.scale, parts)
    for row, slots in enumerate(drawn):
        mapped = torch.stack(slots).flip(0).to(DEVICE)
        q, k, v = case.q[row], case.k, case.v
        exact = reference.decode_attention(q.double(), k.double(), v.double(), mapped, case.scale)
        eager = eager_attention(q, k, v, mapped, case.scale)
        eager_error = (eager.double() - exact).abs().max()
        assert (out[row].double() - exact).abs().max() <= eager_error + 1e-4


def test_one_list_for_all_heads() -> None:
    case = DecodeCase.make([90, 7])
    lists, drawn = make_lists([90, 7], 1, case.k.shape[0])
    head_map = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    spans = spans_of(lists)
    parts = Parts.allocate(spans, case.q.shape[1], 32)
    out = decode_attention(case.q, case.k, case.v, lists, spans, head_map, case.scale, parts)
    for row, slots in enumerate(drawn):
        mapped = slots[0].expand(2, -1).to(DEVICE)
        exact = reference.decode_attention(
            case.q[row].double(), case.k.double(), case.v.double(), mapped, case.scale
        )
        torch.testing.assert_close(out[row].double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.memcheck
def test_lists_of_one_row_differ_in_length() -> None:
    """A head with few keys uses fewer programs than the row's longest list has."""
    counts = [[1, 200], [300, 64], [65, 2]]
    case = DecodeCase.make([300, 200, 100])
    lists, drawn = make_lists(counts, 2, case.k.shape[0])
    spans = spans_of(lists)
    parts = Parts.allocate(spans, case.q.shape[1], 32)
    for part in parts:
        part.fill_(float("nan"))
    for head_map in ([0, 1], [1, 0], [0, 0]):
        mapped = torch.tensor(head_map, dtype=torch.int32, device=DEVICE)
        out = decode_attention(case.q, case.k, case.v, lists, spans, mapped, case.scale, parts)
        for row in range(3):
            for head, chosen in enumerate(head_map):
                group, slots = slice(4 * head, 4 * head + 4), drawn[row][chosen].to(DEVICE)
                q, k, v = case.q[row, group], case.k[:, [head]], case.v[:, [head]]
                exact = reference.decode_attention(
                    q.double(), k.double(), v.double(), slots[None], case.scale
                )
                torch.testing.assert_close(out[row, group].double(), exact, rtol=2e-3, atol=2e-3)


def attend_whole(case: DecodeCase) -> torch.Tensor:
    """Attention of one request of one KV head to all its keys, in a few programs."""
    slots = case.slots_of(0)
    lists = Lists(
        slots.to(torch.int32),
        torch.zeros(1, 1, dtype=torch.int64, device=DEVICE),
        torch.full((1, 1), len(slots), dtype=torch.int32, device=DEVICE),
    )
    spans, head_map = spans_of(lists), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    parts = Parts.allocate(spans, 4, 32)
    return decode_attention(case.q, case.k, case.v, lists, spans, head_map, case.scale, parts)


def test_keys_of_infinite_logits_are_left_out() -> None:
    """Also where they are all that one program reads."""
    case = DecodeCase.make([200], kv_heads=1)
    slots = case.slots_of(0)
    case.k[slots[64:128]] = -torch.inf
    case.q.abs_()
    out = attend_whole(case)
    finite = torch.cat([slots[:64], slots[128:]])[None]
    exact = reference.decode_attention(
        case.q[0].double(), case.k.double(), case.v.double(), finite, case.scale
    )
    torch.testing.assert_close(out[0].double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("key", [math.inf, math.nan])
def test_infinite_logits_stay_with_their_query(key: float) -> None:
    """Of one program or of all: such a query gets NaN, and the row's other heads do not."""
    case = DecodeCase.make([200], kv_heads=1)
    case.q[0, :, 0] = torch.tensor([1.0, 2.0, -1.0, -2.0])
    slot = case.slots_of(0)[70]
    case.k[slot], case.k[slot, :, 0] = 0, key
    out = attend_whole(case)
    exact = reference.decode_attention(
        case.q[0].double(), case.k.double(), case.v.double(), case.slots_of(0)[None], case.scale
    )
    torch.testing.assert_close(out[0].double(), exact, rtol=2e-3, atol=2e-3, equal_nan=True)
    met = [True, True, key != key, key != key]
    assert out[0].isnan().any(1).tolist() == out[0].isnan().all(1).tolist() == met


def test_wrong_head_map_type() -> None:
    case = DecodeCase.make([9])
    lists, _ = make_lists([9], 2, case.k.shape[0])
    head_map, spans = torch.zeros(2, device=DEVICE), spans_of(lists)
    parts = Parts.allocate(spans, 8, 32)
    with pytest.raises(ValueError, match="head_map: expected int32, got float32"):
        decode_attention(case.q, case.k, case.v, lists, spans, head_map, case.scale, parts)


def test_tensors_that_the_kernel_would_misread() -> None:
    case = DecodeCase.make([9])
    lists, _ = make_lists([9], 2, case.k.shape[0])
    head_map, spans = torch.zeros(2, dtype=torch.int32, device=DEVICE), spans_of(lists)
    parts = Parts.allocate(spans, 8, 32)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **out: torch.Tensor) -> None:
        decode_attention(q, k, v, lists, spans, head_map, case.scale, parts, **out)

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor], dim=2)[:, :, :32]

    for name, tensors in (
        ("q", (apart(case.q), case.k, case.v)),
        ("k_cache", (case.q, apart(case.k), case.v)),
        ("v_cache", (case.q, case.k, apart(case.v))),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected the heads of a token side by"):
            attend(*tensors)
    with pytest.raises(ValueError, match="v_cache: expected the keys' stride of 64, got 128"):
        attend(case.q, case.k, torch.cat([case.v, case.v], dim=1)[:, :2])
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        attend(case.q, case.k, case.v, out=apart(case.q))
