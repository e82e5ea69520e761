"""SGLang on a machine without an accelerator: the allocator, grammars, the platform's choice."""

import re
from types import ModuleType

import pytest
import torch
from sglang.srt.constrained import xgrammar_backend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from transformers import AutoTokenizer

from kascade_patches import (
    cpu_platform,
    grammar_apply,
    grammar_apply_reasoning,
    grammar_bitmask,
)
from kascade_sglang.servers.demo_model import MODEL


def make_allocator(page_size: int, pages: int):
    allocator = cpu_platform._torch_paged_allocator()(
        size=pages * page_size,
        page_size=page_size,
        dtype=torch.float32,
        device="cpu",
        kvcache=None,
        need_sort=False,
    )
    return allocator


def extend(allocator, prefix: list[int], total: list[int], last: list[int]) -> torch.Tensor | None:
    prefix_lens, seq_lens = torch.tensor(prefix), torch.tensor(total)
    new = int((seq_lens - prefix_lens).sum())
    return allocator.alloc_extend(
        prefix_lens, prefix_lens, seq_lens, seq_lens, torch.tensor(last, dtype=torch.int32), new
    )


@pytest.mark.parametrize("page_size", [16, 32])
def test_slots_are_consecutive_in_pages_and_never_shared(page_size: int) -> None:
    allocator = make_allocator(page_size, 20)
    lengths = [page_size + 3, 1, 2 * page_size]
    slots = extend(allocator, [0, 0, 0], lengths, [-1, -1, -1])
    tables = [list(part) for part in slots.split(lengths)]
    for _ in range(page_size + 2):
        lengths = [length + 1 for length in lengths]
        last = torch.tensor([int(table[-1]) for table in tables], dtype=torch.int32)
        new = allocator.alloc_decode(torch.tensor(lengths), torch.tensor(lengths), last)
        for table, slot in zip(tables, new, strict=True):
            table.append(slot)
    used = torch.tensor([int(slot) for table in tables for slot in table])
    assert len(used.unique()) == len(used) and used.min() >= page_size
    for table in tables:
        for position, slot in enumerate(table):
            assert int(slot) % page_size == position % page_size


def test_extend_continues_a_page_and_refuses_when_full() -> None:
    allocator = make_allocator(16, 3)
    first = extend(allocator, [0], [20], [-1])
    more = extend(allocator, [20], [40], [int(first[-1])])
    assert int(more[0]) == int(first[-1]) + 1
    assert allocator.available_size() == 0
    assert extend(allocator, [0], [1], [-1]) is None
    full = torch.tensor([49])
    assert allocator.alloc_decode(full, full, more[-1:].int()) is None


def test_platform_gives_way_to_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert cpu_platform.activate() == "kascade_patches.cpu_platform.TorchCpuPlatform"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert cpu_platform.activate() is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert cpu_platform.activate() is None


@pytest.mark.parametrize("hooked", [grammar_apply, grammar_apply_reasoning])
def test_grammars_forbid_tokens_without_a_gpu(hooked: ModuleType) -> None:
    """What xgrammar allows stays as it is, all else becomes impossible, in every row."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    backend = XGrammarGrammarBackend(tokenizer, vocab_size=len(tokenizer))
    logits = torch.randn(2, len(tokenizer))
    expected = logits.clone()
    mask = grammar_bitmask.hook(xgrammar_backend._allocate_token_bitmask, len(tokenizer), 2)
    grammar = backend.dispatch_regex("[0-9]{3}")
    grammar.fill_vocab_mask(mask, 1)
    if hooked is grammar_apply:
        hooked.hook(type(grammar).apply_vocab_mask, grammar, logits, mask)
    else:
        hooked.hook(backend.apply_vocab_mask, logits, mask)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    forbidden = torch.tensor([re.fullmatch("[0-9]{1,3}", text) is None for text in texts])
    assert not forbidden.all()
    expected[1, forbidden] = float("-inf")
    assert torch.equal(logits, expected)
