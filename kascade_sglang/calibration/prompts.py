"""Prompts to calibrate on, from a file of texts to lists of token ids.

``.jsonl`` and ``.ndjson``: one prompt a line, an object with ``text``, ``prompt``, ``messages`` or
ShareGPT's ``conversations`` (chats, rendered with the tokenizer's template). ``.json``: an array of
them. Any other file: plain text, cut into prompts of equal length. Each may be packed by gzip.
"""

import hashlib
import os
import random
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kascade_sglang.calibration.records import records, text_or_chat
from kascade_sglang.errors import CalibrationError
from kascade_sglang.text.reading import UnreadableError, one_line, read_text

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

TEXT_PROMPT_TOKENS = 8192
"""Length of the prompts that plain text is cut into, where neither user nor model says less."""


PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template for models that have none."""

Item = TypeVar("Item")


class Prompt(NamedTuple):
    """Token ids, and spans [begin, end) of them that are replies of the assistant."""

    ids: list[int]
    replies: tuple[tuple[int, int], ...] = ()

    def cut(self, length: int | None) -> "Prompt":
        """Return the first ``length`` tokens; None takes them all."""
        if length is None or length >= len(self.ids):
            return self
        spans = tuple((begin, min(end, length)) for begin, end in self.replies if begin < length)
        return Prompt(self.ids[:length], spans)


def read_prompts(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    context: int | None,
    max_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Return the file's prompts, in file order.

    context: the model's context length. max_tokens: cut prompts to this many tokens.
    limit: draw this many prompts with the seed.
    Raises CalibrationError where the file is unreadable or empty, a line is not a prompt, or a
    prompt is longer than the context.
    """
    check_limits(context, max_tokens, limit)
    text = _read_text(path)
    found = records(path, text)
    if found is None:
        prompts = cut_text(text, tokenizer, context, max_tokens)
    else:
        prompts = [
            to_prompt(record, where, tokenizer, context, max_tokens) for where, record in found
        ]
    if not prompts:
        raise CalibrationError(f"{path}: no prompts in it")
    return draw(prompts, limit, seed)


def check_limits(context: int | None, max_tokens: int | None, limit: int | None) -> None:
    """Refuse a ``--max-tokens`` or ``--limit`` that leaves nothing or exceeds the context."""
    if max_tokens is not None and max_tokens < 1:
        raise CalibrationError(f"--max-tokens: expected 1 or more, got {max_tokens}")
    if max_tokens is not None and context is not None and max_tokens > context:
        raise CalibrationError(
            f"--max-tokens {max_tokens}: more than the model's context of {context} tokens; lower "
            "it, or say in the model's config.json how its rotary embeddings are scaled "
            "(rope_scaling, max_position_embeddings)"
        )
    if limit is not None and limit < 1:
        raise CalibrationError(f"--limit: expected 1 or more, got {limit}")


def draw(prompts: list[Item], limit: int | None, seed: int) -> list[Item]:
    """Draw ``limit`` prompts with the seed, in their order; None takes them all."""
    if limit is None or limit >= len(prompts):
        return prompts
    drawn = sorted(random.Random(seed).sample(range(len(prompts)), limit))
    return [prompts[index] for index in drawn]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_text(path: Path) -> str:
    try:
        text = read_text(path)
    except UnreadableError as error:
        raise CalibrationError(f"{path}: cannot read the prompts ({error})") from error
    if not text.strip():
        raise CalibrationError(f"{path}: the file is empty")
    return text


def to_prompt(
    record: Any,
    where: str,
    tokenizer: "PreTrainedTokenizerBase",
    context: int | None,
    max_tokens: int | None,
) -> Prompt:
    """Return the prompt of a record; ``records.text_or_chat`` says of which.

    where: what to call it in a refusal. Raises CalibrationError for another object, and for a
    prompt longer than the context unless ``max_tokens`` cuts it.
    """
    try:
        prompt = _prompt_of(record, tokenizer)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error
    if max_tokens is None and context is not None and len(prompt.ids) > context:
        raise CalibrationError(
            f"{where}: a prompt of {len(prompt.ids)} tokens, more than the model's context "
            f"of {context}; --max-tokens {context} cuts it"
        )
    return prompt.cut(max_tokens)


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase", **options: bool) -> "BatchEncoding":
    try:
        text.encode()  # JSON may escape half of a surrogate pair
    except UnicodeEncodeError as error:
        raise CalibrationError(f"not Unicode text ({error.reason})") from error
    return tokenizer(text, verbose=False, **options)


def _prompt_of(record: Any, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
    found = text_or_chat(record)
    if isinstance(found, str):
        return Prompt(list(_encode(found, tokenizer).input_ids))
    return chat_prompt(found, tokenizer)


def chat_prompt(
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    instead: str | None = None,
) -> Prompt:
    """Return the prompt of a chat and where its replies are, if the tokenizer can tell.

    instead: the template of tokenizers that have none. Raises CalibrationError for a chat that the
    template refuses.
    """
    template = getattr(tokenizer, "chat_template", None) or instead
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(template)
            raise CalibrationError(f"expected a chat template named default, got {names}")
        template = template["default"]
    if not template:
        raise CalibrationError("a chat needs a chat template, and the tokenizer has none")
    # Templates are programs of their own: their errors are of any type.
    try:
        text = _render(messages, messages[-1]["role"] == "user", tokenizer, template)
    except Exception as error:
        why = one_line(error)
        raise CalibrationError(f"the chat template refuses the messages ({why})") from error
    # The template has written the special tokens already.
    options = {"add_special_tokens": False, "return_offsets_mapping": tokenizer.is_fast}
    encoded = _encode(text, tokenizer, **options)
    ids = list(encoded.input_ids)
    if not tokenizer.is_fast:
        return Prompt(ids)
    spans = _reply_spans(messages, text, tokenizer, template)
    starts = [start for start, _ in encoded.offset_mapping]
    ends = [end for _, end in encoded.offset_mapping]
    return Prompt(ids, tuple((bisect_right(ends, a), bisect_left(starts, b)) for a, b in spans))


def _render(
    messages: list[dict[str, Any]],
    prompting: bool,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompting
    )


def _reply_spans(
    messages: list[Any], text: str, tokenizer: "PreTrainedTokenizerBase", template: str
) -> list[tuple[int, int]]:
    """Characters of the rendered chat that the assistant has written, end of turn included.

    A template that renders earlier turns otherwise once more follow hides them: those are left
    out. Where it asks for a reply in other words than it leads one in (with a thought, which the
    rendered reply lacks), a reply starts where the two part.
    """
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = _render(messages[:turn], False, tokenizer, template)
            asking = _render(messages[:turn], True, tokenizer, template)
            after = _render(messages[: turn + 1], False, tokenizer, template).rstrip()
        except Exception:  # as above; some refuse a chat that an assistant begins
            continue
        if text.startswith(before) and text.startswith(after):
            begin = max(len(before), len(os.path.commonprefix([asking, text])))
            spans.append((begin, len(after)))
    return spans


def cut_text(
    text: str, tokenizer: "PreTrainedTokenizerBase", context: int | None, max_tokens: int | None
) -> list[Prompt]:
    """Cut one text into prompts of ``max_tokens``, each led as the tokenizer leads a text."""
    length = max_tokens or min(TEXT_PROMPT_TOKENS, context or TEXT_PROMPT_TOKENS)
    ids = list(_encode(text, tokenizer, add_special_tokens=False).input_ids)
    lead = tokenizer("a").input_ids[:1]
    lead = lead if lead and lead[0] == tokenizer.bos_token_id else []
    step = max(1, length - len(lead))
    return [Prompt(lead + ids[start : start + step]) for start in range(0, len(ids), step)]
