"""What borrowed keys do to the last hidden state, against whole passes of the model."""

from copy import deepcopy

import pytest
import torch
from transformers import LlamaForCausalLM

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_sglang.calibration import replay
from kascade_sglang.calibration.collect import measure_prompt, sample_tiles
from kascade_sglang.calibration.errors import CalibrationError
from kascade_sglang.calibration.hf_attention import our_attention
from kascade_sglang.calibration.limited_attention import capped_sparse_attention
from kascade_sglang.calibration.prompts import Prompt

BUDGET = Budget(0.1, 64)
LENGTH = 6 * TILE + 5
REPLIES = ((150, 154), (180, 190))


def prompt_of(length: int = LENGTH) -> Prompt:
    draw = torch.Generator().manual_seed(3)
    return Prompt(torch.randint(4, 64, (length,), generator=draw).tolist(), REPLIES)


class Borrowing:
    """Attention matrices in full; in layer j, rows keep what layer i's matrix says is greatest."""

    def __init__(self, i: int, j: int, rows: list[int], head_map: list[int]) -> None:
        self.i, self.j, self.rows, self.head_map = i, j, rows, head_map

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (states.repeat_interleave(group, dim=1) for states in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        logits.masked_fill_(later, float("-inf"))
        if layer == self.i:
            self.mass = logits.softmax(-1).unflatten(0, (-1, group)).sum(1)  # [H, L, L]
        if layer == self.j:
            for row in self.rows:
                start, count = TILE * tile_of(row), BUDGET.selected(tile_of(row))
                for head, source in enumerate(self.head_map):
                    kept = self.mass[source, row, :start].topk(count).indices
                    hidden = torch.ones(len(q), dtype=torch.bool)
                    hidden[kept] = hidden[start:] = False
                    mine = logits[head * group : (head + 1) * group, row]
                    mine.masked_fill_(hidden, float("-inf"))
        return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)


@torch.inference_mode()
def last_hidden(model: LlamaForCausalLM, prompt: Prompt, attention: Borrowing) -> torch.Tensor:
    ids = torch.tensor([prompt.ids])
    with our_attention(model):
        return model.get_decoder()(
            input_ids=ids, use_cache=False, kascade=attention
        ).last_hidden_state[0]


def test_equals_whole_passes_in_which_one_layer_borrows(llama: LlamaForCausalLM) -> None:
    model, prompt = deepcopy(llama).double(), prompt_of()
    tiles = sample_tiles(LENGTH, BUDGET, 64, seed=0)
    found = measure_prompt(model, prompt, tiles, BUDGET, range(4))
    rows = replay.answering_rows(LENGTH, REPLIES)
    assert rows == [*range(149, 153), *range(179, 189)] and found.rows == len(rows)
    dense = last_hidden(model, prompt, Borrowing(-1, -1, [], []))[rows]
    maps = found.similarity.argmax(-1)
    for j in range(4):
        for i in range(j + 1):
            head_map = [0, 1] if i == j else maps[i, j].tolist()
            changed = last_hidden(model, prompt, Borrowing(i, j, rows, head_map))[rows]
            error = (changed - dense).square().sum(-1) / dense.square().sum(-1)
            expected = 0.0 if j == 0 else float(error.mean())
            assert found.error[i, j] == pytest.approx(expected, rel=1e-6), (i, j)
    assert found.error[1, 2] > 1e-4
    assert not found.error[1:, 0].any()


def test_a_budget_of_everything_changes_nothing(llama: LlamaForCausalLM) -> None:
    tiles = sample_tiles(LENGTH, BUDGET, 64, seed=0)
    found = measure_prompt(llama, prompt_of(), tiles, Budget(1.0, 64), range(4))
    assert found.error.max() < 1e-9


@pytest.mark.parametrize(
    "length, replies, rows",
    [
        (10, ((0, 2), (5, 7)), [0, 4, 5]),
        (6, (), [0, 1, 2, 3, 4, 5]),
        (3000, (), list(range(3000 - replay.MOST_ROWS, 3000))),
        (3000, ((100, 200), (2990, 2992)), [2989, 2990]),
        (3000, ((100, 200),), list(range(3000 - replay.MOST_ROWS, 3000))),
        (3000, ((2000, 3000),), list(range(2999 - replay.MOST_ROWS, 2999))),
    ],
    ids=["before each token", "no reply", "the last ones", "near the end", "too far", "long"],
)
def test_rows_that_answer(length: int, replies: tuple, rows: list[int]) -> None:
    assert replay.answering_rows(length, replies) == rows


def test_refuses_layers_that_do_not_give_the_model(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model hands its layers positions in a form that is not cut."""
    monkeypatch.setattr(replay, "_cut", lambda value, length, first: replay_from_zero(value, first))
    tiles = sample_tiles(LENGTH, BUDGET, 64, seed=0)
    with pytest.raises(CalibrationError, match="another result than the model .* --criterion mass"):
        measure_prompt(llama, prompt_of(), tiles, BUDGET, range(4))


def replay_from_zero(options: dict, first: int) -> dict:
    cos, sin = options["position_embeddings"]
    count = cos.shape[1] - first
    return {"position_embeddings": (cos[:, :count], sin[:, :count])}


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_capped_sparse_attention_in_float64(softcap: float) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 8, generator=draw).double() for n, h in ((1, 4), (70, 2), (70, 2)))
    selected, own = torch.tensor([[3, 40, 9], [0, 63, 5]]), torch.arange(64, 70)
    found = capped_sparse_attention(q, k, v, selected, own, 0.5, softcap)
    for head in range(4):
        keys = torch.cat([selected[head // 2], own])
        logits = softcap * torch.tanh(k[keys, head // 2] @ q[0, head] * 0.5 / softcap)
        expected = logits.softmax(0) @ v[keys, head // 2]
        torch.testing.assert_close(found[0, head], expected)
