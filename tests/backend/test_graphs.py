"""Captured decode steps: lengths change between replays, and every bit equals the eager step's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kascade_kernels.budget import Budget
from kascade_sglang.asks import EVERYTHING, Ask
from kascade_sglang.host.steps import set_asks
from tests.support.harness import DEVICE, HEAD_DIM, Harness

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")

LENGTHS = [400, 90, 33]


class CapturedDecode:
    """One decode step of all layers over static inputs, as SGLang's runner captures it.

    With a harness of chains, the step that verifies them.
    """

    def __init__(self, harness: Harness, requests: int) -> None:
        self.harness, self.chain = harness, harness.chain
        rows = requests * self.chain
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if self.chain == 1 else ForwardMode.TARGET_VERIFY,
            req_pool_indices=torch.zeros(requests, dtype=torch.int64, device=DEVICE),
            seq_lens=torch.ones(requests, dtype=torch.int64, device=DEVICE),
            out_cache_loc=torch.zeros(rows, dtype=torch.int64, device=DEVICE),
            spec_info=SimpleNamespace(draft_token_num=self.chain),
        )
        backend = harness.backend
        backend.init_cuda_graph_state(requests, rows)
        heads = (8, 2, 2)
        self.inputs = [
            [torch.zeros(rows, h, HEAD_DIM, dtype=torch.float16, device=DEVICE) for h in heads]
            for _ in range(harness.layers)
        ]
        backend.init_forward_metadata_out_graph(self.batch, in_capture=True)
        self.graph = torch.cuda.CUDAGraph()
        for _ in range(2):
            self._run()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.outputs = self._run()

    def _run(self) -> list[torch.Tensor]:
        backend = self.harness.backend
        backend.init_forward_metadata_in_graph(self.batch)
        outputs = []
        for layer_id, (q, k, v) in enumerate(self.inputs):
            layer = self.harness.layer(layer_id)
            outputs.append(backend.forward(q.flatten(1), k, v, layer, self.batch))
        return outputs

    def replay(self, positions: dict[int, int]) -> list[torch.Tensor]:
        """Run the new tokens of some requests from their positions on; other rows are padding."""
        harness, batch, chain = self.harness, self.batch, self.chain
        batch.req_pool_indices.zero_()
        batch.seq_lens.fill_(1)
        batch.out_cache_loc.zero_()
        for index, (request, position) in enumerate(positions.items()):
            rows = slice(index * chain, (index + 1) * chain)
            new = slice(position, position + chain)
            batch.req_pool_indices[index] = request + 1
            # Without the drafts, where there are any.
            batch.seq_lens[index] = position + (chain == 1)
            batch.out_cache_loc[rows] = harness.req_to_token[request + 1, new].to(torch.int64)
            for layer_id, tensors in enumerate(self.inputs):
                for into, whole in zip(tensors, harness.qkv[layer_id][request], strict=True):
                    into[rows] = whole[new]
        asks = tuple(harness.asks.get(request) for request in positions)
        set_asks(harness.runner, asks if any(asks) else ())
        harness.backend.init_forward_metadata_out_graph(batch)
        # From here on SGLang may give the rows to others.
        table = harness.req_to_token.clone()
        harness.req_to_token.zero_()
        self.graph.replay()
        harness.req_to_token.copy_(table)
        count = len(positions) * chain
        return [out[:count].view(count, 8, HEAD_DIM) for out in self.outputs]


class EagerAndCaptured:
    """The same requests, prefilled, to be decoded in both ways."""

    def __init__(self, **options: Any) -> None:
        self.eager, self.captured = (
            Harness(LENGTHS, budget=Budget(0.1, 64), **options) for _ in range(2)
        )
        for harness in (self.eager, self.captured):
            harness.step([(0, 0, 300), (1, 0, 60), (2, 0, 20)])
        self.decode = CapturedDecode(self.captured, requests=3)

    def step(self, offset: int, asks: dict[int, Ask]) -> None:
        """Decode the tokens so far behind the prompts; both ways give the same bits."""
        eager, steps = self.eager, {0: 300 + offset, 1: 60 + offset, 2: 20 + offset}
        eager.asks = self.captured.asks = asks
        if eager.chain == 1:
            eager.step([(request, at, at + 1) for request, at in steps.items()])
        else:
            eager.verify(list(steps.items()))
        outputs = self.decode.replay(steps)
        for layer in range(eager.layers):
            found = outputs[layer].split(eager.chain)
            for out, (request, at) in zip(found, steps.items(), strict=True):
                assert torch.equal(out, eager.outputs[layer][request][at : at + eager.chain])


FP8 = {"exact": False, "kv_cache_dtype": "fp8_e4m3", "scales": (0.6, 1.5)}


@pytest.mark.parametrize(
    "options", [{"exact": True}, {"exact": False}, FP8], ids=["exact", "default", "fp8"]
)
@pytest.mark.parametrize("heads", ["per_head", "pooled"])
def test_replays_equal_eager_steps(options: dict[str, Any], heads: str) -> None:
    pair = EagerAndCaptured(heads=heads, **options)
    # 60 to 66 crosses the length up to which the budget covers everything.
    for offset in range(6):
        pair.step(offset, {})


@pytest.mark.parametrize("options", [{"exact": True}, {"exact": False}, FP8], ids=str)
def test_replayed_chains_equal_eager_ones(options: dict[str, Any]) -> None:
    pair = EagerAndCaptured(chain=4, **options)
    dense = Ask(EVERYTHING, EVERYTHING)
    # Some drafts are rejected: the next chain begins before the last one's end.
    for offset, asks in ((0, {}), (1, {0: dense}), (5, {}), (7, {2: dense})):
        pair.step(offset, asks)


def test_captured_chains_have_the_bits_of_single_steps() -> None:
    single, verified = (
        Harness(LENGTHS, batch_invariant=True, exact=False, chain=chain) for chain in (1, 4)
    )
    for harness in (single, verified):
        harness.step([(0, 0, 300), (1, 0, 60)])
    for request, begin in ((0, 300), (1, 60)):
        for position in range(begin, begin + 4):
            single.step([(request, position, position + 1)])
    outputs = CapturedDecode(verified, requests=5).replay({0: 300, 1: 60})
    for layer, out in enumerate(outputs):
        expected = [single.outputs[layer][r][at : at + 4] for r, at in ((0, 300), (1, 60))]
        assert torch.equal(out, torch.cat(expected))


def test_what_requests_ask_for_changes_between_replays() -> None:
    """One graph: nobody asks, then two do, then another one, then nobody."""
    dense, more = Ask(EVERYTHING, EVERYTHING), Ask(Budget(0.1, 64), Budget(0.4, 96))

    pair = EagerAndCaptured(exact=False, max_ratio=0.5)
    for offset, asks in enumerate([{}, {0: dense, 1: more}, {0: more}, {}]):
        pair.step(offset, asks)


def test_replays_with_candidate_pools_equal_eager_steps() -> None:
    """A request asks for every key, whose pool is then its row of the table, and stops asking."""
    plan = {"layers": 6, "anchors": (0, 1, 2, 4), "makers": (1,)}
    pair, dense = EagerAndCaptured(exact=False, **plan), Ask(EVERYTHING, EVERYTHING)
    for offset, asks in enumerate([{}, {0: dense}, {1: dense}, {}, {}, {}]):
        pair.step(offset, asks)


def test_padding_changes_nothing() -> None:
    full, padded = (Harness(LENGTHS, batch_invariant=True) for _ in range(2))
    outputs = []
    for harness, rows in ((full, 1), (padded, 4)):
        harness.step([(0, 0, 300)])
        outputs.append(CapturedDecode(harness, rows).replay({0: 300}))
    for one, four in zip(*outputs, strict=True):
        assert torch.equal(one[0], four[0])
