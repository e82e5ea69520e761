"""Layers with a sliding window: the dense backend computes them, beside layers that are sparse."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kascade_kernels.budget import Budget
from kascade_sglang.config import KascadeConfig, every_layer_an_anchor
from kascade_sglang.plan.schema import LayerRole
from kascade_sglang.sparsity import key_reads
from tests.support.harness import DEVICE, DTYPE, Harness, expected_output, make_plan

WINDOW = 40
LENGTHS = [1, 40, 41, 173]
TOLERANCE = 1e-5 if DTYPE is torch.float32 else 2e-3


def windowed_harness(lengths: list[int], **changes: object) -> Harness:
    """Layers 1 and 3 are anchors, layer 4 reuses; the first of them attends to everything."""
    layers = {"layers": 5, "anchors": (1, 3), "windowed": (0, 2), "window": WINDOW}
    return Harness(lengths, **layers, **changes)


@pytest.mark.parametrize("phases", ["both", "decode"])
def test_windowed_layers_attend_in_their_window(phases: str) -> None:
    """In chunks, in a mixed batch and in decoding; the other layers as ever."""
    harness = windowed_harness(LENGTHS, phases=phases)
    harness.step([(3, 0, 128)])
    harness.step([(0, 0, 1), (1, 0, 39), (2, 0, 40), (3, 128, 171)])
    harness.step([(1, 39, 40), (2, 40, 41), (3, 171, 172)])
    harness.step([(3, 172, 173)])
    roles = [harness.config.plan.role(layer) for layer in range(5)]
    assert roles.count(LayerRole.WINDOW) == 2 and roles[1] is LayerRole.DENSE
    sparse = range(5) if phases == "both" else (0, 2)
    for layer in sparse:
        for request in range(len(LENGTHS)):
            out = harness.outputs[layer][request].double().cpu()
            expected = expected_output(harness, layer, request)
            torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)
    # 172 and 173 keys of which 64 are attended to.
    assert harness.selections[4][3][5, 172].shape == (2, 64 - 32)


def test_a_model_that_turns_heads_and_tokens_round() -> None:
    """Gemma 3's queries: [1, tokens, heads, D] over numbers that lie as [heads, tokens, D]."""
    flat, turned = windowed_harness([70]), windowed_harness([70])
    forward = turned.backend.forward

    def turn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer, batch) -> torch.Tensor:
        heads = q.view(len(k), layer.tp_q_head_num, layer.qk_head_dim)
        turned = heads.transpose(0, 1).contiguous().unsqueeze(0).permute(0, 2, 1, 3)
        return forward(turned, k, v, layer, batch).reshape(len(k), -1)

    turned.backend.forward = turn
    for harness in (flat, turned):
        harness.prefill(0, 69)
        harness.step([(0, 69, 70)])
    for layer in range(5):
        assert torch.equal(flat.outputs[layer][0], turned.outputs[layer][0])


def test_captured_steps_prepare_the_dense_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Dense:
        needs_cpu_seq_lens = False

        def __getattr__(self, name: str) -> object:
            return lambda *arguments: calls.append((name, arguments[1:]))

    for harness, expected in ((Harness([40]), False), (windowed_harness([40]), True)):
        calls.clear()
        backend, batch = harness.backend, captured_batch(harness)
        monkeypatch.setattr(backend.paths.decode, "reserve", lambda rows: None)
        backend.dense = Dense()
        backend.init_cuda_graph_state(2, 2)
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        backend.init_forward_metadata_in_graph(batch)
        backend.on_after_cuda_graph_warmup()
        backend.init_forward_metadata_out_graph(batch)
        prepared = [
            ("init_cuda_graph_state", (2,)),
            ("init_forward_metadata_out_graph", (True,)),
            ("init_forward_metadata_in_graph", ()),
            ("on_after_cuda_graph_warmup", ()),
            ("init_forward_metadata_out_graph", (False,)),
        ]
        assert calls == (prepared if expected else [])


def captured_batch(harness: Harness) -> SimpleNamespace:
    harness.step([(0, 0, 39)])
    ends = torch.tensor([40])
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=torch.ones(1, dtype=torch.int64, device=DEVICE),
        seq_lens=ends.to(DEVICE),
        seq_lens_cpu=ends,
        out_cache_loc=harness.req_to_token[1, 39:40].to(torch.int64),
    )


@pytest.mark.parametrize(
    "phase, phases", [("prefill", "both"), ("prefill", "decode"), ("decode", "both")]
)
@pytest.mark.parametrize("layers", [None, range(2, 5)], ids=["all-layers", "a-stage"])
def test_a_windowed_layer_reads_its_window(phase: str, phases: str, layers: range | None) -> None:
    plan = make_plan(layers=5, kv_heads=2, group=4, anchors=(1, 3), windowed=(0, 2))
    budget, positions = Budget(0.1, 64), np.arange(300)
    config = KascadeConfig(plan, budget, "per_head", phases=phases, window=WINDOW)
    reads = key_reads(config, positions, layers, phase)
    attended = scored = dense = 0
    dense_step = phase == "prefill" and phases == "decode"
    for layer in layers or range(5):
        for position in map(int, positions):
            seen = min(position + 1, WINDOW) if layer in plan.windowed else position + 1
            dense += seen
            attends_to_all = dense_step or layer in (0, 1, 2)
            attended += seen if attends_to_all else budget.attended(position)
            if layer in plan.anchors and not dense_step and not budget.is_dense(position // 32):
                scored += position + 1
    assert (reads.attended, reads.scored, reads.dense) == (attended, scored, dense)


def test_every_layer_with_full_attention_can_select_for_itself() -> None:
    plan = make_plan(layers=5, kv_heads=2, group=4, anchors=(1, 3), windowed=(0, 2))
    assert every_layer_an_anchor(plan).anchors == (1, 3, 4)
