"""What borrowed keys do to the last hidden state, against whole passes of the model."""

import pytest
import torch
from transformers import LlamaForCausalLM

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_sglang.calibration import replay
from kascade_sglang.calibration.collect import full_layers, measure_prompt, sample_tiles
from kascade_sglang.calibration.hf_attention import DenseAttention, LayerCall, our_attention
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.calibration.spans import Span, spans_of
from kascade_sglang.errors import CalibrationError
from tests.support.families import FAMILIES, GEMMA, build

BUDGET = Budget(0.1, 64)
LENGTH = 6 * TILE + 5
REPLIES = ((150, 154), (180, 190))


def prompt_of(length: int = LENGTH) -> Prompt:
    draw = torch.Generator().manual_seed(3)
    return Prompt(torch.randint(4, 64, (length,), generator=draw).tolist(), REPLIES)


class Borrowing(DenseAttention):
    """Attention matrices in full; in layer j, spans keep what layer i's matrix says is greatest."""

    def __init__(self, i: int, j: int, spans: list[Span], head_map: list[int]) -> None:
        self.i, self.j, self.spans, self.head_map = i, j, spans, head_map

    def attend(self, call: LayerCall) -> torch.Tensor:
        layer, q, k, v, scale, limits = call
        group = q.shape[1] // k.shape[1]
        k, v = (states.repeat_interleave(group, dim=1) for states in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        if limits.softcap is not None:
            logits = limits.softcap * torch.tanh(logits / limits.softcap)
        distance = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
        unseen = (distance < 0) | (distance >= (limits.window or len(q)))
        logits.masked_fill_(unseen, float("-inf"))
        if layer == self.i:
            self.mass = logits.softmax(-1).unflatten(0, (-1, group)).sum(1)  # [H, L, L]
        if layer == self.j:
            for begin, end in self.spans:
                start, count = TILE * tile_of(begin), BUDGET.selected(tile_of(begin))
                for head, source in enumerate(self.head_map):
                    kept = self.mass[source, begin:end, :start].sum(0).topk(count).indices
                    hidden = torch.ones(len(q), dtype=torch.bool)
                    hidden[kept] = hidden[start:] = False
                    mine = logits[head * group : (head + 1) * group, begin:end]
                    mine.masked_fill_(hidden, float("-inf"))
        return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)


@torch.inference_mode()
def last_hidden(model: LlamaForCausalLM, prompt: Prompt, attention: Borrowing) -> torch.Tensor:
    ids = torch.tensor([prompt.ids])
    with our_attention(model):
        return model.get_decoder()(
            input_ids=ids, use_cache=False, kascade=attention
        ).last_hidden_state[0]


@pytest.mark.parametrize("family", ["llama3", "phi3", "gemma2", "gemma3"])
def test_equals_whole_passes_in_which_one_layer_borrows(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma3 = ("Gemma3Text", {**GEMMA, "num_hidden_layers": 6, "sliding_window_pattern": 2}, ())
    monkeypatch.setitem(FAMILIES, "gemma3", gemma3)
    model, prompt = build(family).double(), prompt_of()
    layers = full_layers(model, LENGTH)
    tiles = sample_tiles(LENGTH, BUDGET, 64, seed=0)
    found = measure_prompt(model, prompt, tiles, BUDGET, layers)
    rows = replay.answering_rows(prompt, BUDGET)
    assert rows == [*range(149, 153), *range(179, 189)] and found.rows == len(rows)
    spans = spans_of(LENGTH, rows, BUDGET)
    dense = last_hidden(model, prompt, Borrowing(-1, -1, [], []))[rows]
    maps = found.similarity.argmax(-1)
    for j in range(len(layers)):
        for i in range(j + 1):
            head_map = [0, 1] if i == j else maps[i, j].tolist()
            borrowing = Borrowing(layers[i], layers[j], spans, head_map)
            changed = last_hidden(model, prompt, borrowing)[rows]
            error = (changed - dense).square().sum(-1) / dense.square().sum(-1)
            expected = 0.0 if j == 0 else float(error.mean())
            assert found.error[i, j] == pytest.approx(expected, rel=1e-6), (i, j)
    assert found.error[0, 1] > 1e-4
    assert not found.error[1:, 0].any()


@pytest.mark.parametrize(
    "length, replies, rows",
    [
        (300, ((250, 252), (290, 291)), [249, 250, 289]),
        (300, ((0, 2), (5, 7), (290, 291)), [289]),
        (300, ((5, 7),), list(range(300 - replay.MOST_ROWS, 300))),
        (180, (), list(range(64, 180))),
        (3000, (), list(range(3000 - replay.MOST_ROWS, 3000))),
        (3000, ((100, 104), (2990, 2992)), [99, 100, 101, 102, 2989, 2990]),
        (3000, ((100, 200),), list(range(99, 199))),
        (3000, ((2000, 3000),), list(range(2999 - replay.MOST_ROWS, 2999))),
    ],
    ids=[
        "before each token",
        "not where all keys are read",
        "none but there",
        "no reply",
        "the last ones",
        "all of two replies",
        "far from the end",
        "long",
    ],
)
def test_rows_that_answer(length: int, replies: tuple, rows: list[int]) -> None:
    """With a budget of at least 64 keys, the first two tiles leave none out."""
    assert replay.answering_rows(Prompt([0] * length, replies), BUDGET) == rows


def test_refuses_layers_that_do_not_give_the_model(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a decoder does more than to run its layers and the last norm."""
    monkeypatch.setattr(replay, "last_norm", lambda _: torch.nn.Identity())
    tiles = sample_tiles(LENGTH, BUDGET, 64, seed=0)
    with pytest.raises(CalibrationError, match="another result than the model .* --criterion mass"):
        measure_prompt(llama, prompt_of(), tiles, BUDGET, range(4))


def test_refuses_layers_that_cannot_be_run(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a decoder hands its layers something that it fills in as it goes."""
    monkeypatch.setattr(replay, "_NOT_KEPT", ("hidden_states", "kascade", "position_embeddings"))
    tiles = sample_tiles(LENGTH, BUDGET, 64, seed=0)
    with pytest.raises(CalibrationError, match="cannot be run one by one .* --criterion mass"):
        measure_prompt(llama, prompt_of(), tiles, BUDGET, range(4))
