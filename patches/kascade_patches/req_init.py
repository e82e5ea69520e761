"""Note what a request asks for, and keep its KV apart in the radix cache.

Why: KV depends on the attention that made it, and SGLang tells KV by tokens and ``extra_key``.
How: after a request is made in the scheduler, read what it asks for, count it, and add it to the
    request's ``extra_key``, behind the user's own. What may not be asked for ends the request with
    status 400, as what SGLang itself refuses there.
Remove when: plugins can verify a request's parameters and name its KV.
"""

from typing import Any

from kascade_sglang.asks import MARK, NAME, Ask, asked_in, kind_of, reader_here
from kascade_sglang.errors import KascadeError

TARGET = "sglang.srt.managers.schedule_batch.Req.__init__"
KIND = "AFTER"
ATTRIBUTE = "kascade"
"""Of a request: its ``Ask``."""


def hook(result: None, request: Any, *arguments: object, **named: object) -> None:
    """Read what a request asks for."""
    asked = asked_in(getattr(request.sampling_params, "custom_params", None))
    key = request.extra_key or ""
    try:
        ask = None if asked is None and MARK not in key else _read(request, asked, key)
    except KascadeError as error:
        request.set_finish_with_abort(str(error))
        return
    if reader_here() is not None:
        # Not before: see ``published``.
        from kascade_sglang.backend.published import count_request

        count_request(kind_of(asked, ask))
    if ask is not None:
        setattr(request, ATTRIBUTE, ask)
        request.extra_key = key + ask.key


def _read(request: Any, asked: object, key: str) -> Ask | None:
    if MARK in key:
        raise KascadeError(
            f"extra_key: expected no {MARK!r}, which names KV of requests with a setting, got "
            f"{key!r}; choose another key"
        )
    reader = reader_here()
    if reader is None:
        raise KascadeError(
            f"custom_params.{NAME}: expected a server with --attention-backend kascade, got "
            "another; drop it"
        )
    if request.session is not None or getattr(request, "session_id", None) is not None:
        raise KascadeError(
            f"custom_params.{NAME}: expected no session, whose earlier KV may be of another kind, "
            "got one; send the whole prompt without a session"
        )
    return reader.read(asked)
