"""Ask a server questions with the openai client, and measure what a user feels."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from openai import APIError, AsyncOpenAI, DefaultAsyncHttpxClient

from kascade_sglang.servers.demo_model import MODEL_NAME
from kascade_sglang.servers.loopback import uses_proxies
from kascade_sglang.servers.process import ServerError
from kascade_sglang.text.documents import MAX_TOKENS, Document, Question, is_correct, messages


@dataclass(frozen=True)
class Answer:
    """One reply. Times in seconds; token counts as the server reports them."""

    question: Question
    text: str
    first_token: float
    total: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def correct(self) -> bool:
        """Whether the reply holds the right value."""
        return is_correct(self.question, self.text)


def client_of(url: str, timeout: float = 600) -> AsyncOpenAI:
    """Return a client of the server at ``url``; timeout: seconds for one reply."""
    http = DefaultAsyncHttpxClient(trust_env=uses_proxies(url))
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=timeout, http_client=http)


async def ask(
    client: AsyncOpenAI,
    document: Document,
    question: Question,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Stream one reply; ``on_text`` gets its pieces as they arrive.

    Raises ServerError where none comes.
    """
    try:
        return await _ask(client, document, question, on_text)
    except APIError as error:
        raise ServerError(f"the server did not answer {question.text!r}: {error}") from error


async def _ask(
    client: AsyncOpenAI, document: Document, question: Question, on_text: Callable[[str], None]
) -> Answer:
    started = time.monotonic()
    first, pieces, usage = None, [], None
    stream = await client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages(document, question),
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            pieces.append(chunk.choices[0].delta.content)
            on_text(pieces[-1])
    if usage is None or first is None:
        raise ServerError(f"the server sent no reply to {question.text!r}")
    details = usage.prompt_tokens_details
    return Answer(
        question=question,
        text="".join(pieces).strip(),
        first_token=first - started,
        total=time.monotonic() - started,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        output_tokens=usage.completion_tokens,
    )


async def ask_all(
    client: AsyncOpenAI,
    document: Document,
    questions: list[Question],
    concurrency: int,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Ask several questions about one document, at most ``concurrency`` at a time, in order."""
    gate = asyncio.Semaphore(concurrency)

    async def one(question: Question) -> Answer:
        async with gate:
            answer = await ask(client, document, question)
        on_answer(answer)
        return answer

    return list(await asyncio.gather(*map(one, questions)))
