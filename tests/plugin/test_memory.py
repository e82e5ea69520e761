"""What the KV pool leaves for the kernels: copies of keys, scores, lists, slots and parts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.server_args import ServerArgs

from kascade_sglang import checks, compat
from kascade_sglang.config import MB, load_config
from models import SHAPE

LISTS, ROOM = 4, 409 - 32 + 32
"""KV heads; a tenth of the 4096 positions, in which the own tile is counted, and a tile."""
SLOTS = 4 * 8 * 4096
"""Of eight captured requests."""
PARTS = 4 * 8 * 8 * 64 * (16 + 1)
"""Eight requests of eight query heads in 64 parts, each a row of a head and its log-sum-exp."""


@pytest.fixture
def server_args(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ServerArgs]:
    """Arguments of a server whose kernels run, as they are in a worker."""

    def make(exact: bool = False, pooled: bool = False, chunk: int = 256) -> ServerArgs:
        model = str(make_model())
        args = ServerArgs(model_path=model, attention_backend="kascade", chunked_prefill_size=chunk)
        config = load_config(model, SHAPE)
        config = replace(config, exact=exact, heads="pooled" if pooled else "per_head")
        monkeypatch.setattr(checks, "check_server_args", lambda given: config)
        monkeypatch.setattr(compat, "has_gpu", lambda: True)
        monkeypatch.setattr(compat, "largest_decodes", lambda given: (8, 0))
        return args

    return make


def test_scores_and_lists_are_counted(server_args: Callable[..., ServerArgs]) -> None:
    reserved = checks.reserved_memory(server_args(chunk=256))
    decode_and_prefill_rows = 8 + 256 // 32
    others = 768 * MB + SLOTS + PARTS
    assert reserved.scratch - others == 4 * decode_and_prefill_rows * LISTS * ROOM
    pooled = checks.reserved_memory(server_args(pooled=True))
    assert pooled.scratch - others == 4 * decode_and_prefill_rows * ROOM


def test_copies_are_counted_by_the_token(server_args: Callable[..., ServerArgs]) -> None:
    anchors, kv_heads, head_dim = 2, 4, 16
    copied = checks.reserved_memory(server_args()).per_token
    assert copied == anchors * kv_heads * (head_dim + 4)
    assert checks.reserved_memory(server_args(exact=True)).per_token == 0


def test_unchunked_prefill_counts_what_a_step_may_hold(
    server_args: Callable[..., ServerArgs],
) -> None:
    """A prompt as long as the context is taken whole, if it is the step's only one."""
    args = server_args(chunk=-1)
    assert compat.largest_prefill(args) == max(args.max_prefill_tokens, 4096) > 256
    object.__setattr__(args, "max_prefill_tokens", 128)
    assert compat.largest_prefill(args) == 4096


@pytest.mark.parametrize(
    ("backend", "most", "sizes", "running", "expected"),
    [
        ("full", 8, [1, 2, 16], None, (16, 0)),
        ("full", 8, None, 12, (8, 12)),
        ("full", 8, None, 8, (8, 0)),
        ("disabled", 8, [1, 2], None, (0, 0)),
        ("disabled", 8, [1, 2], 5, (0, 5)),
    ],
)
def test_decode_batches_are_captured_or_as_many_as_may_run(
    backend: str, most: int, sizes: list[int] | None, running: int | None, expected: tuple[int, int]
) -> None:
    decode = SimpleNamespace(backend=backend, max_bs=most, bs=sizes)
    config = SimpleNamespace(decode=decode)
    args = SimpleNamespace(cuda_graph_config=config, max_running_requests=running)
    assert compat.largest_decodes(args) == expected


def test_nothing_is_reserved_for_decoding_that_is_not_known(
    server_args: Callable[..., ServerArgs], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = server_args(chunk=256)
    monkeypatch.setattr(compat, "largest_decodes", lambda given: (0, 0))
    assert checks.reserved_memory(args).scratch == 768 * MB + 4 * 256 // 32 * LISTS * ROOM
