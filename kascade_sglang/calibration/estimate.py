"""How long a calibration will take, said before it starts."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kascade_sglang.calibration.hf_attention import DenseAttention, our_attention
from kascade_sglang.calibration.hf_model import decoder_layers
from kascade_sglang.calibration.prompts import Prompt

LONG = 3600.0
"""Seconds from which on a shorter way is offered."""
TRIED = 2048
"""Tokens of the pass that is timed, at most: it must not be a large part of the whole."""


@torch.inference_mode()
def seconds_per_work(model: PreTrainedModel, prompt: Prompt) -> float:
    """Time one dense pass over a prompt: seconds for a unit of ``work_of``."""
    device = model.get_input_embeddings().weight.device
    device = "cpu" if device.type == "meta" else device
    ids = torch.tensor([prompt.ids[:TRIED]], device=device)
    with our_attention(model):
        begin = time.monotonic()
        end = model.get_decoder()(input_ids=ids, use_cache=False, kascade=DenseAttention())
        end.last_hidden_state[0, -1, 0].item()  # waits for the device
    return (time.monotonic() - begin) / (ids.shape[1] * len(decoder_layers(model)))


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
