"""The backend against float64 attention, and against itself under other schedules."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from triton.runtime.errors import OutOfResources

from kascade_kernels.budget import Budget
from kascade_kernels.reference import tile_scores
from kascade_sglang.backend import paths
from kascade_sglang.backend.decode import DecodeBuffers, DecodeStep
from kascade_sglang.backend.warm_up import warm_up
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.steps import Batch, Layer
from tests.support.harness import DEVICE, DTYPE, HEAD_DIM, Harness, attended, expected_output
from tests.support.shapes import INTERPRETED

KERNELS = DEVICE == "cuda" or INTERPRETED
TOLERANCE = 1e-5 if DTYPE is torch.float32 else 2e-3
LONG = 301
HEADS = [(group, heads) for group in (1, 4, 8) for heads in ("per_head", "pooled")]
CHUNKS, PAGES, PREFIXES = [32, 64, 160], [1, 16, 32, 64], [32, 128, 288]
if INTERPRETED:  # Each program of a kernel takes it milliseconds.
    LONG, HEADS, CHUNKS, PAGES, PREFIXES = 173, [HEADS[0], HEADS[-1]], [160], [32], [128]
LENGTHS = [1, 31, 32, 33, 127, 129, LONG]


def assert_same(left: Harness, right: Harness, request: int, begin: int = 0) -> None:
    """Selections and sparse outputs from position ``begin`` on are equal to the last bit."""
    for layer in range(left.layers):
        theirs, ours = (
            {key: found for key, found in h.selections[layer][request].items() if key[1] >= begin}
            for h in (left, right)
        )
        assert theirs and ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key])
        if layer > 0:
            out = [h.outputs[layer][request][begin:] for h in (left, right)]
            assert torch.equal(*out)


def test_what_one_side_lacks_is_a_difference() -> None:
    left, right = Harness([70]), Harness([70])
    for harness in (left, right):
        harness.prefill(0, 70)
    assert_same(left, right, 0)
    for harness in (left, right):
        lost = harness.selections[1][0].popitem()
        with pytest.raises(AssertionError):
            assert_same(left, right, 0)
        harness.selections[1][0].update([lost])


@pytest.mark.parametrize("group, heads", HEADS)
def test_mixed_batch_equals_float64_attention(group: int, heads: str) -> None:
    harness = Harness(LENGTHS, group=group, heads=heads)
    harness.step([(request, 0, length) for request, length in enumerate(LENGTHS)])
    for layer in range(harness.layers):
        for request in range(len(LENGTHS)):
            expected = expected_output(harness, layer, request)
            out = harness.outputs[layer][request].double().cpu()
            torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    harness = Harness([LONG], dtype=dtype)
    harness.prefill(0, LONG)
    for layer in (1, 2, 3):
        expected = expected_output(harness, layer, 0)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in harness.qkv[layer][0])
        mask = attended(harness, layer, 0).repeat_interleave(harness.group, 0).to(q.device)
        eager = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[None], enable_gqa=True
        )
        errors = [
            (out.double().cpu() - expected).norm() / expected.norm()
            for out in (harness.outputs[layer][0], eager[0].transpose(0, 1))
        ]
        assert errors[0] <= errors[1]


def test_anchor_selects_the_largest_scores() -> None:
    harness = Harness([LONG])
    harness.prefill(0, LONG)
    q, k, _ = (tensor.double().cpu() for tensor in harness.qkv[2][0])
    # Kernels round scores to 1/1024 octave before they select.
    rtol = 1e-3 if KERNELS else 1e-6
    assert [tile for tile, _ in harness.selections[2][0]] == list(range(-(-LONG // 32)))
    for (tile, first), positions in harness.selections[2][0].items():
        end = min(32 * (tile + 1), LONG)
        scores = tile_scores(q[first:end], k[:end], HEAD_DIM**-0.5)
        budget = harness.config.budget.selected(tile)
        assert positions.shape == (2, budget)
        kept = scores.gather(1, positions).sum(1)
        best = scores.topk(budget, dim=1).values.sum(1)
        torch.testing.assert_close(kept, best, rtol=rtol, atol=1e-9)


def test_reuse_layers_follow_the_head_map() -> None:
    harness = Harness([LONG])
    harness.prefill(0, LONG)
    for layer, anchor in ((1, 0), (3, 2)):
        head_map = list(harness.config.plan.head_map[layer])
        assert head_map != [0, 1] and harness.selections[layer][0]
        for key, positions in harness.selections[layer][0].items():
            assert torch.equal(positions, harness.selections[anchor][0][key][head_map])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
def test_chunks_change_no_bit(chunk: int, page_size: int, exact: bool) -> None:
    whole = Harness([301], page_size=page_size, exact=exact)
    whole.prefill(0, 301)
    # Less memory for scores cuts the tiles into other groups.
    chunked = Harness([301], page_size=page_size, exact=exact, slot_seed=5, score_memory=2**16)
    chunked.prefill(0, chunk)
    assert_same(whole, chunked, 0)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefix_hit_changes_no_bit(prefix: int) -> None:
    cold = Harness([LONG], page_size=32)
    cold.prefill(0, LONG)
    warm = Harness([LONG], page_size=32)
    for layer in range(warm.layers):
        slots = warm.req_to_token[1, :prefix].to(torch.int64)
        warm.pool.keys[layer][slots] = warm.qkv[layer][0][1][:prefix]
        warm.pool.values[layer][slots] = warm.qkv[layer][0][2][:prefix]
    warm.prefill(0, LONG, begin=prefix)
    assert_same(cold, warm, 0, begin=prefix)


def test_batch_mates_change_no_bit() -> None:
    alone = Harness([LONG])
    alone.prefill(0, LONG)
    together = Harness([LONG, 77, 100])
    together.step([(2, 0, 100), (0, 0, LONG), (1, 0, 77)])
    assert_same(alone, together, 0)


def test_requests_on_one_prefix_decode_as_if_each_had_its_own() -> None:
    lengths, prefix = [167, 166, 137], 128
    apart, together = (Harness(lengths, layers=2, anchors=(0, 1), exact=False) for _ in range(2))
    for harness in (apart, together):
        for layer in harness.qkv:
            for q_k_v in layer[1:]:
                for own, first in zip(q_k_v, layer[0], strict=True):
                    own[:prefix] = first[:prefix]
    together.req_to_token[2:, :prefix] = together.req_to_token[1, :prefix]
    for harness in (apart, together):
        harness.step([(request, 0, n - 1) for request, n in enumerate(lengths)])
        harness.step([(request, n - 1, n) for request, n in enumerate(lengths)])
    if KERNELS:
        assert together.backend.running.step.buffers.shared.keys.tolist() == [*[prefix] * 3, 0]
    for request, length in enumerate(lengths):
        assert_same(apart, together, request, begin=length - 1)


def test_decode_equals_one_token_extend_and_float64() -> None:
    decode, extend = Harness([140, 70]), Harness([140, 70])
    # Request 0 goes on to its next tile.
    for harness, mode in ((decode, ForwardMode.DECODE), (extend, ForwardMode.MIXED)):
        harness.step([(0, 0, 95), (1, 0, 65)])
        for offset in range(3):
            harness.step([(0, 95 + offset, 96 + offset), (1, 65 + offset, 66 + offset)], mode)
    for layer in range(1, 4):
        for request, (begin, end) in enumerate([(95, 98), (65, 68)]):
            ours = decode.outputs[layer][request][begin:end]
            theirs = extend.outputs[layer][request][begin:end]
            if not KERNELS:
                assert torch.equal(ours, theirs)
            expected = expected_output(decode, layer, request)[begin:end]
            for out in (ours, theirs):
                out = out.double().cpu()
                torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_budget_of_everything_is_dense() -> None:
    harness = Harness([LONG], budget=Budget(1.0, 64))
    harness.prefill(0, LONG)
    for layer in range(harness.layers):
        q, k, v = (tensor.double().transpose(0, 1)[None] for tensor in harness.qkv[layer][0])
        dense = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        out = harness.outputs[layer][0].double()
        torch.testing.assert_close(out, dense, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("exact", [False, True], ids=["default", "exact"])
def test_only_decoding_is_sparse_where_phases_say_so(exact: bool) -> None:
    """Prefill is dense in every layer, and a decode step is the one that both phases have."""
    both, decode = (Harness([161], exact=exact, phases=phases) for phases in ("both", "decode"))
    for harness in (both, decode):
        harness.prefill(0, 64)
        assert not harness.selections[2][0] or harness is both
        harness.step([(0, 160, 161)])
    for layer in range(4):
        q, k, v = (tensor.double().transpose(0, 1)[None] for tensor in decode.qkv[layer][0])
        dense = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        out = decode.outputs[layer][0].double()
        torch.testing.assert_close(out[:160], dense[:160], rtol=TOLERANCE, atol=TOLERANCE)
        if layer:
            assert not torch.allclose(out[160], dense[160], rtol=TOLERANCE, atol=TOLERANCE)
    assert_same(both, decode, 0, begin=160)


def test_comparisons_keep_the_budget() -> None:
    exact = Harness([301])
    exact.prefill(0, 301)
    for method in ("window", "random"):
        other = Harness([301], selection=method)
        other.prefill(0, 301)
        assert other.selections[2][0].keys() == exact.selections[2][0].keys()
        for key, positions in other.selections[2][0].items():
            assert positions.shape == exact.selections[2][0][key].shape
            assert (positions.diff(dim=1) > 0).all()
            assert ((positions >= 0) & (positions < 32 * key[0])).all()
        if method == "window":
            last = other.selections[2][0][9, 288][0].tolist()
            assert last == [0, 1, 2, 3, *range(288 - 28, 288)]


def test_idle_batch_computes_nothing() -> None:
    harness = Harness([40])
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE, out_cache_loc=None)
    harness.backend.init_forward_metadata(idle)
    layer = SimpleNamespace(tp_q_head_num=8, v_head_dim=HEAD_DIM)
    assert (
        harness.backend.forward(torch.empty(0, 8 * HEAD_DIM), None, None, layer, idle).numel() == 0
    )


def test_reuse_before_its_anchor_is_refused() -> None:
    harness = Harness([40])
    with pytest.raises(KascadeError, match="before its anchor, layer 2"):
        harness.backend.paths.store.get(3)


@pytest.mark.skipif(not KERNELS, reason="the reference takes any tile")
def test_kernels_refuse_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "TILE", 16)
    with pytest.raises(KascadeError, match="KASCADE_TILE: expected 32, the kernels' tile, got 16"):
        Harness([40])


@pytest.mark.skipif(not KERNELS, reason="nothing is compiled")
def test_warming_up_changes_no_result() -> None:
    plain, warmed = Harness([161], exact=False), Harness([161], exact=False)
    warm_up(warmed.backend.paths, Layer(0, 1.0), DTYPE)
    with pytest.raises(KascadeError, match="before its anchor"):
        warmed.backend.paths.store.get(1)
    for harness in (plain, warmed):
        harness.prefill(0, 160)
        harness.step([(0, 160, 161)])
    assert_same(plain, warmed, 0)


@pytest.mark.skipif(not KERNELS, reason="the reference reads SGLang's table, and is not captured")
def test_a_decode_step_reads_its_own_copy_of_the_slot_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang gives a finished request's row to the next one while its last step still runs."""
    kept, rewritten = Harness([161, 100], exact=False), Harness([161, 100], exact=False)
    table, path = rewritten.req_to_token, rewritten.backend.paths.decode
    rewritten.req_to_token = table.clone()
    record = path.record

    def record_late(batch: Batch) -> DecodeStep:
        table.zero_()
        return record(batch)

    monkeypatch.setattr(path, "record", record_late)
    for harness in (kept, rewritten):
        harness.step([(0, 0, 160), (1, 0, 99)])
        harness.step([(0, 160, 161), (1, 99, 100)])
    for request, length in enumerate(kept.lengths):
        assert_same(kept, rewritten, request, begin=length - 1)


@pytest.mark.skipif(not KERNELS, reason="the reference has no buffers")
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_batches_of_all_sizes_share_buffers_of_a_known_size(batch_invariant: bool) -> None:
    lengths = [33, 34, 35, 36, 37]
    harness = Harness(lengths, batch_invariant=batch_invariant)
    found = set()
    harness.step([(request, 0, 30) for request in range(5)])
    for size in (5, 1, 3, 4):
        harness.step([(request, 30, 31) for request in range(size)])
        buffers = harness.backend.running.step.buffers
        found.add(id(buffers))
    assert len(found) == 1
    made = vars(buffers).values()
    flat = [tensor for value in made for tensor in (value if isinstance(value, tuple) else [value])]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in flat
        if isinstance(tensor, torch.Tensor)
    }
    taken = sum(storages.values())
    sizes = harness.backend.paths.sizes
    assert DecodeBuffers(buffers.most, sizes, harness.config, "meta").nbytes == taken


def test_prompts_shorter_than_a_tile_share_little_memory_for_scores() -> None:
    harness = Harness([20] * 40, layers=2, anchors=(0, 1), score_memory=2**16)
    harness.step([(request, 0, 20) for request in range(40)])
    for request in range(40):
        expected, out = expected_output(harness, 1, request), harness.outputs[1][request]
        torch.testing.assert_close(out.double().cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.skipif(not KERNELS, reason="nothing is compiled")
def test_kernels_that_do_not_fit_the_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness([40])

    def select(*arguments: object) -> None:
        raise OutOfResources(328192, 232448, "shared memory")

    monkeypatch.setattr(harness.backend.paths.extend, "select", select)
    with pytest.raises(KascadeError, match="to fit this GPU, got out of resource.*kascade-exact"):
        warm_up(harness.backend.paths, Layer(0, 1.0), DTYPE)


@pytest.mark.skipif(KERNELS, reason="the kernels can be captured: test_graphs.py")
def test_graph_capture_is_refused() -> None:
    with pytest.raises(KascadeError, match="disable-cuda-graph"):
        Harness([40]).backend.init_cuda_graph_state(1, 1)
