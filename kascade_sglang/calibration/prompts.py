"""Prompts to calibrate on, from a file of texts to lists of token ids.

``.jsonl``: one prompt a line, an object with ``text``, ``prompt`` or ``messages`` (a chat, rendered
with the tokenizer's template). Any other file: plain text, cut into prompts of equal length.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kascade_sglang.calibration.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_PROMPT_TOKENS = 8192
"""Length of the prompts that plain text is cut into, where neither user nor model says less."""


def read_prompts(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    context: int | None,
    max_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Return the file's prompts as token ids, in file order.

    context: the model's context length. max_tokens: cut prompts to this many tokens.
    limit: draw this many prompts with the seed.
    Raises CalibrationError where the file is unreadable or empty, a line is not a prompt, or a
    prompt is longer than the context.
    """
    check_limits(context, max_tokens, limit)
    text = _read_text(path)
    if path.suffix == ".jsonl":
        prompts = _from_lines(path, text, tokenizer, context, max_tokens)
    else:
        prompts = cut_text(text, tokenizer, context, max_tokens)
    if not prompts:
        raise CalibrationError(f"{path}: no prompts in it")
    return draw(prompts, limit, seed)


def check_limits(context: int | None, max_tokens: int | None, limit: int | None) -> None:
    """Refuse a ``--max-tokens`` or ``--limit`` that leaves nothing or exceeds the context."""
    if max_tokens is not None and max_tokens < 1:
        raise CalibrationError(f"--max-tokens: expected 1 or more, got {max_tokens}")
    if max_tokens is not None and context is not None and max_tokens > context:
        raise CalibrationError(
            f"--max-tokens {max_tokens}: more than the model's context of {context} tokens"
        )
    if limit is not None and limit < 1:
        raise CalibrationError(f"--limit: expected 1 or more, got {limit}")


def draw(prompts: list[list[int]], limit: int | None, seed: int) -> list[list[int]]:
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
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot read the prompts ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text ({error.reason})") from error
    if not text.strip():
        raise CalibrationError(f"{path}: the file is empty")
    return text


def _from_lines(
    path: Path,
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    context: int | None,
    max_tokens: int | None,
) -> list[list[int]]:
    prompts = []
    # Not splitlines: JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}:{number}: not JSON ({error})") from error
        prompts.append(to_prompt(record, f"{path}:{number}", tokenizer, context, max_tokens))
    return prompts


def to_prompt(
    record: Any,
    where: str,
    tokenizer: "PreTrainedTokenizerBase",
    context: int | None,
    max_tokens: int | None,
) -> list[int]:
    """Return the token ids of an object with ``text``, ``prompt`` or ``messages``.

    where: what to call it in a refusal. Raises CalibrationError for another object, and for a
    prompt longer than the context unless ``max_tokens`` cuts it.
    """
    try:
        ids = _tokens_of(record, tokenizer)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error
    if max_tokens is None and context is not None and len(ids) > context:
        raise CalibrationError(
            f"{where}: a prompt of {len(ids)} tokens, more than the model's context "
            f"of {context}; --max-tokens {context} cuts it"
        )
    return ids[:max_tokens]


def _encode(
    text: str, tokenizer: "PreTrainedTokenizerBase", add_special_tokens: bool = True
) -> list[int]:
    try:
        text.encode()  # JSON may escape half of a surrogate pair
    except UnicodeEncodeError as error:
        raise CalibrationError(f"not Unicode text ({error.reason})") from error
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return list(ids)


def _tokens_of(record: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if isinstance(record, dict):
        for key in ("text", "prompt"):
            if isinstance(record.get(key), str):
                return _encode(record[key], tokenizer)
        if isinstance(record.get("messages"), list):
            return _tokens_of_chat(record["messages"], tokenizer)
    raise CalibrationError('expected an object with "text", "prompt" or "messages"')


def _tokens_of_chat(messages: list[Any], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError('"messages" need a chat template, and the tokenizer has none')
    if not messages or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        raise CalibrationError('"messages": expected objects with "role" and "content"')
    # Templates are programs of their own: their errors are of any type.
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
        )
    except Exception as error:
        raise CalibrationError(f"the chat template refuses the messages ({error})") from error
    # The template has written the special tokens already.
    return _encode(rendered, tokenizer, add_special_tokens=False)


def cut_text(
    text: str, tokenizer: "PreTrainedTokenizerBase", context: int | None, max_tokens: int | None
) -> list[list[int]]:
    """Cut one text into prompts of ``max_tokens``, each led as the tokenizer leads a text."""
    length = max_tokens or min(TEXT_PROMPT_TOKENS, context or TEXT_PROMPT_TOKENS)
    ids = _encode(text, tokenizer, add_special_tokens=False)
    lead = tokenizer("a").input_ids[:1]
    lead = lead if lead and lead[0] == tokenizer.bos_token_id else []
    step = max(1, length - len(lead))
    return [lead + ids[start : start + step] for start in range(0, len(ids), step)]
