"""What a model loses where all layers are sparse, against whole passes of the model."""

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_sglang.calibration import answers, hf_model
from kascade_sglang.calibration.answers import Selecting, SparseAnswers, answers_of, check_answers
from kascade_sglang.calibration.collect import full_layers
from kascade_sglang.calibration.hf_attention import DenseAttention, LayerCall, our_attention
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.errors import CalibrationError
from tests.support.families import FAMILIES, GEMMA, build, build_with_sinks

BUDGET = Budget(0.1, 64)
LENGTH = 6 * TILE + 5
ROWS = list(range(LENGTH - 40, LENGTH))


def prompt_of(length: int = LENGTH) -> Prompt:
    draw = torch.Generator().manual_seed(3)
    return Prompt(torch.randint(4, 64, (length,), generator=draw).tolist())


def maps_of(layers: int) -> torch.Tensor:
    """Heads swapped between layers, so that a forgotten map shows."""
    maps = torch.tensor([1, 0]).expand(layers, layers, 2).clone()
    maps[range(layers), range(layers)] = torch.tensor([0, 1])
    return maps


def weights_of(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of [Hq, L, L]; a head's sink [Hq] takes weight and has no value."""
    if sinks is None:
        return logits.softmax(-1)
    exponents = logits.exp()
    return exponents / (
        exponents.sum(-1, keepdim=True) + sinks.to(logits.dtype).exp()[:, None, None]
    )


class Whole(DenseAttention):
    """Attention matrices in full; rows keep what their layer's anchor says is greatest."""

    def __init__(self, rows: list[int], how: Selecting, anchors: tuple[int, ...]) -> None:
        self.rows, self.how, self.anchors = rows, how, anchors
        self.kept: dict[tuple[int, int, int], torch.Tensor] = {}  # layer, head, row -> keys

    def attend(self, call: LayerCall) -> torch.Tensor:
        layer, q, k, v, scale, limits = call
        group, length = q.shape[1] // k.shape[1], len(q)
        k, v = (states.repeat_interleave(group, dim=1) for states in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        if limits.softcap is not None:
            logits = limits.softcap * torch.tanh(logits / limits.softcap)
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        unseen = (distance < 0) | (distance >= (limits.window or length))
        logits.masked_fill_(unseen, float("-inf"))
        if layer in self.how.layers:
            self.hide(layer, logits, group, limits.sinks)
        return torch.einsum("hqk,khd->qhd", weights_of(logits, limits.sinks), v)

    def hide(
        self, layer: int, logits: torch.Tensor, group: int, sinks: torch.Tensor | None
    ) -> None:
        mass = weights_of(logits, sinks).unflatten(0, (-1, group)).sum(1)  # [H, L, L]
        mass = mass.sum(0, keepdim=True).expand_as(mass) if self.how.pooled else mass
        anchor = max(one for one in self.anchors if one <= layer)
        places = self.how.layers.index(anchor), self.how.layers.index(layer)
        for head, source in enumerate(self.how.head_maps[places].tolist()):
            for row in self.rows:
                start, count = TILE * tile_of(row), self.how.budget.selected(tile_of(row))
                if layer in self.anchors:
                    self.kept[layer, head, row] = mass[head, row, :start].topk(count).indices
                if layer == self.how.layers[0]:
                    continue
                hidden = torch.ones(logits.shape[-1], dtype=torch.bool)
                hidden[self.kept[anchor, source, row]] = hidden[start:] = False
                logits[head * group : (head + 1) * group, row].masked_fill_(hidden, float("-inf"))


@torch.inference_mode()
def logprobs(model: PreTrainedModel, attention: DenseAttention) -> torch.Tensor:
    with our_attention(model):
        found = model(torch.tensor([prompt_of().ids]), use_cache=False, kascade=attention)
    return found.logits[0, ROWS].log_softmax(-1)


def loss_of(model: PreTrainedModel, how: Selecting, anchors: tuple[int, ...]) -> float:
    dense, sparse = (logprobs(model, one) for one in (DenseAttention(), Whole(ROWS, how, anchors)))
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama3", "phi3", "gemma2", "gemma3", "oss"])
@pytest.mark.parametrize("pooled", [False, True])
def test_equals_whole_passes_in_which_all_layers_are_sparse(
    family: str, pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are a prompt's last, so nothing dense follows them in a whole pass."""
    capped = {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    monkeypatch.setitem(FAMILIES, "gemma2", ("Gemma2", {**capped, "num_hidden_layers": 8}, ()))
    gemma3 = ("Gemma3Text", {**GEMMA, "num_hidden_layers": 6, "sliding_window_pattern": 2}, ())
    monkeypatch.setitem(FAMILIES, "gemma3", gemma3)
    # The experts' products know no float64.
    model = build_with_sinks(1.0, layers=8) if family == "oss" else build(family).double()
    layers = full_layers(model, LENGTH)
    how = Selecting(layers, maps_of(len(layers)), BUDGET, pooled)
    found = answers_of(model, prompt_of(), ROWS)
    check_answers(found, how)
    sparse = SparseAnswers(found, how)
    fewer = (layers[0], *layers[2:])
    with sparse.loaded():
        assert sparse.keep(layers) == pytest.approx(loss_of(model, how, layers), rel=1e-3, abs=1e-6)
        expected = loss_of(model, how, fewer)
        assert expected > 1e-4
        assert sparse.loss_without(layers[1]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert sparse.loss_without(layers[2]) != pytest.approx(expected, rel=1e-2)
        assert sparse.keep(fewer) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        last = sparse.loss_without(layers[-1])
    with sparse.loaded():  # what is kept outlasts the keys
        assert sparse.keep(fewer) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert last == pytest.approx(loss_of(model, how, fewer[:-1]), rel=1e-3, abs=1e-6)
        assert sparse.keep(layers) == pytest.approx(loss_of(model, how, layers), rel=1e-3, abs=1e-6)


def spread(first: int, end: int) -> list[int]:
    return [first + place * (end - first) // 48 for place in range(48)]


@pytest.mark.parametrize(
    "length, replies, rows",
    [
        (300, ((250, 252), (290, 291)), [249, 250, 289]),
        (300, ((0, 2), (5, 7), (290, 291)), [289]),
        (300, ((5, 7),), spread(64, 300)),
        (100, (), list(range(64, 100))),
        (3000, (), spread(64, 3000)),
        (3000, ((100, 104), (2990, 2992)), [99, 100, 101, 102, 2989, 2990]),
        (3000, ((100, 200),), spread(99, 199)),
        (3000, ((100, 124), (2000, 2072)), spread(0, 96)),
    ],
    ids=[
        "before each token",
        "not where all keys are read",
        "none but there",
        "short",
        "no reply",
        "all of two replies",
        "far from the end",
        "of both replies",
    ],
)
def test_rows_that_answer(length: int, replies: tuple, rows: list[int]) -> None:
    """With a budget of at least 64 keys, the first two tiles leave none out."""
    if replies == ((100, 124), (2000, 2072)):
        rows = [99 + at if at < 24 else 1975 + at for at in rows]
    assert answers.answering_rows(Prompt([0] * length, replies), BUDGET) == rows


def test_refuses_layers_that_do_not_give_the_model(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a decoder does more than to run its layers and the last norm."""
    monkeypatch.setattr(hf_model, "last_norm", lambda _: torch.nn.Identity())
    found = answers_of(llama, prompt_of(), ROWS)
    with pytest.raises(CalibrationError, match="another answer than the model .* --criterion mass"):
        check_answers(found, Selecting(tuple(range(4)), maps_of(4), BUDGET))


def test_refuses_layers_that_cannot_be_run(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a decoder hands its layers something that it fills in as it goes."""
    monkeypatch.setattr(answers, "_NOT_KEPT", ("hidden_states", "kascade", "position_embeddings"))
    found = answers_of(llama, prompt_of(), ROWS)
    with pytest.raises(CalibrationError, match="cannot be run one by one .* --criterion mass"):
        check_answers(found, Selecting(tuple(range(4)), maps_of(4), BUDGET))
