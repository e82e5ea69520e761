"""How long a calibration will take, said before it starts."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kascade_sglang.calibration.collect import work_of
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


def describe(
    per_work: float, lengths: Sequence[int], layers: Sequence[int], depth: int, criterion: str
) -> str:
    """Say what prompts of these lengths will take and, where that is long, what would not."""
    each = [per_work * work_of(length, layers, depth, criterion) for length in lengths]
    total = sum(each)
    what = "1 prompt" if len(each) == 1 else f"{len(each)} prompts"
    sentence = f"{what} of up to {max(lengths)} tokens: about {_time(total)}"
    if total <= LONG or criterion == "mass":
        return sentence
    by_mass = per_work * sum(work_of(length, layers, depth, "mass") for length in lengths)
    fewer = int(LONG * len(each) / total)
    ways = [f"--limit {fewer} about {_time(fewer * total / len(each))}"] if fewer else []
    # Work grows with a prompt's length, attention's part with its square.
    tokens = int(max(lengths) * LONG / each[0]) // 512 * 512 if not fewer else 0
    ways += [f"--limit 1 --max-tokens {tokens} about {_time(LONG)}"] if tokens >= 1024 else []
    ways.append(f"--criterion mass about {_time(by_mass)}")
    return f"{sentence}; {', '.join(ways)}"


def _time(seconds: float) -> str:
    """Seconds in words, rounded as an estimate is."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} seconds"
