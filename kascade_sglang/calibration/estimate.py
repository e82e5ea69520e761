"""How long a calibration will take, said before it starts."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kascade_sglang.calibration.answers import MOST_ROWS
from kascade_sglang.calibration.hf_attention import DenseAttention, our_attention
from kascade_sglang.calibration.hf_model import decoder_layers, input_ids
from kascade_sglang.calibration.prompts import Prompt

LONG = 3600.0
"""Seconds from which on a shorter way is offered."""
TRIED = 2048
"""Tokens of the pass that is timed, at most: it must not be a large part of the whole."""


def seconds_per_work(model: PreTrainedModel, prompt: Prompt) -> float:
    """Time one dense pass over a prompt: seconds for a unit of work, a layer run for a token."""
    ids = prompt.ids[:TRIED]
    return _time_pass(model, ids) / (len(ids) * len(decoder_layers(model)))


def row_work(model: PreTrainedModel, prompt: Prompt, per_work: float) -> float:
    """Work of running the rows of an answer through one layer, of ``seconds_per_work``.

    Few rows read all weights, and their logits are of the whole vocabulary. What they take to look
    at a long prompt's keys is not in it.
    """
    seconds = _time_pass(model, prompt.ids[:MOST_ROWS], keep=MOST_ROWS)
    return seconds / per_work / len(decoder_layers(model))


@torch.inference_mode()
def _time_pass(model: PreTrainedModel, ids: list[int], keep: int = 1) -> float:
    """Seconds of a dense pass with the logits of the last ``keep`` tokens."""
    row = input_ids(model, ids)
    with our_attention(model):
        begin = time.monotonic()
        found = model(row, use_cache=False, logits_to_keep=keep, kascade=DenseAttention())
        found.logits[0, -1, 0].item()  # waits for the device
    return time.monotonic() - begin


def describe(seconds: float, lengths: Sequence[int]) -> str:
    """Say what prompts of these lengths will take and, where that is long, what would not."""
    count = len(lengths)
    what = "1 prompt" if count == 1 else f"{count} prompts"
    sentence = f"{what} of up to {max(lengths)} tokens: about {_time(seconds)}"
    if seconds <= LONG:
        return sentence
    fewer = int(LONG * count / seconds)
    if fewer:
        return f"{sentence}; --limit {fewer} about {_time(fewer * seconds / count)}"
    # Work grows with a prompt's length, attention's part with its square.
    tokens = int(max(lengths) * LONG * count / seconds) // 512 * 512
    return f"{sentence}; --limit 1 --max-tokens {max(tokens, 512)} is the shortest"


def _time(seconds: float) -> str:
    """Seconds in words, rounded as an estimate is."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} seconds"
