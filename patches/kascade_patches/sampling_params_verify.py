"""Refuse what a request may not ask for, with HTTP 400 and one sentence.

Why: SGLang passes ``custom_params`` on unread.
How: before the verification of sampling parameters, whose ValueError SGLang answers with 400,
    streams of the OpenAI API included. Where this process does not know the server's budgets,
    ``req_init`` refuses in the scheduler.
Remove when: plugins can verify a request's parameters.
"""

from typing import Any

from kascade_sglang.asks import reader_here

TARGET = "sglang.srt.sampling.sampling_params.SamplingParams.verify"
KIND = "BEFORE"


def hook(sampling_params: Any, vocab_size: int) -> None:
    """Raise KascadeError, which is a ValueError."""
    reader = reader_here()
    if reader is not None:
        reader.check(sampling_params.custom_params)
