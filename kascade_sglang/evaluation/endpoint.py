"""A running OpenAI-compatible server: what it serves, its replies and its counters."""

import os
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx
import openai

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.samples import Sample
from kascade_sglang.servers.counters import KeyCounters, read_key_counters
from kascade_sglang.servers.loopback import uses_proxies

PROMPTS = ("chat_prefix", "chat", "completion")
"""How prompts are sent: as a chat whose reply starts with the benchmark's prefix (SGLang), as a
chat whose user message ends with it (any server), or as text to continue."""
MALFORMED = (
    *(KeyError, IndexError, TypeError, AttributeError, ValueError),
    *(RecursionError, OverflowError),
)
"""What parsing raises where a reply is not what was asked for."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reply:
    """What came back.

    loss: mean of the scored tokens in nats, for perplexity alone. finish: why the reply ended, in
    OpenAI's words. thought: whether the server called all of it a thought, so that ``text`` is one.
    """

    text: str
    prompt_tokens: int
    output_tokens: int
    seconds: float
    loss: float | None = None
    finish: str = ""
    thought: bool = False


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    url: without ``/v1``. model: the served name. others: what else the server serves.
    context: most tokens of prompt and reply together; None where the server does not say.
    tokenizer: its folder or id; None where the server does not say.
    backend: SGLang's attention backend, ``server`` for other servers.
    adapter: the LoRA adapter that is asked, where SGLang must be told apart from its base model.
    template: what the chat template is given, besides messages.
    """

    url: str
    model: str
    context: int | None
    tokenizer: str | None
    backend: str
    others: tuple[str, ...] = ()
    adapter: str | None = None
    base: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def probe(
        cls, url: str, model: str | None = None, template: Mapping[str, Any] | None = None
    ) -> "Endpoint":
        """Ask the server what it is; raises EvaluationError where none answers.

        model: of those that it serves; None takes the first that is no adapter of another.
        """
        if not url.startswith(("http://", "https://")):
            raise EvaluationError(
                f"--url: expected an address that begins with http:// or https://, got {url}; "
                "write it as in http://127.0.0.1:30000"
            )
        url = url.rstrip("/").removesuffix("/v1")
        listed = _get(f"{url}/v1/models", required=True)
        try:
            cards = [_card(card) for card in listed["data"]]
            first = next((card for card in cards if not card["parent"]), cards[0])
        except MALFORMED as error:
            raise EvaluationError(
                f"--url {url}: expected an OpenAI-compatible server, but /v1/models names no model "
                f"as OpenAI's does ({_brief(error)})"
            ) from error
        card = first if model is None else _pick(cards, model)
        info, settings = _get(f"{url}/model_info"), _get(f"{url}/server_info")
        parents = [each for each in cards if each["id"] == card["parent"]]
        context = next((each["context"] for each in (card, *parents) if each["context"]), None)
        backend = _text_of(settings, "attention_backend")
        return cls(
            url=url,
            model=card["id"],
            context=context,
            tokenizer=_text_of(info, "tokenizer_path") or _text_of(info, "model_path"),
            backend=backend or "server",
            others=tuple(each["id"] for each in cards if each is not card),
            # By its name alone, SGLang would answer with the base model.
            adapter=card["id"] if backend and card["parent"] else None,
            base=card["parent"],
            template=template or {},
        )

    @property
    def asked(self) -> str:
        """The model's name as requests give it."""
        return self.model if self.adapter is None else f"{self.base}:{self.adapter}"

    def key_counters(self) -> KeyCounters:
        """Kascade's counters; empty where there are none. Raises EvaluationError."""
        try:
            return read_key_counters(self.url)
        except (httpx.HTTPError, ImportError):
            return {}
        except MALFORMED as error:
            raise EvaluationError(
                f"{self.url}/metrics: expected Prometheus's text format, got another "
                f"({_brief(error)}); give --url of the server itself"
            ) from error

    def client(self, timeout: float) -> openai.AsyncOpenAI:
        """A client of the server; ``timeout`` in seconds, for one reply."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key=_api_key(),
            timeout=timeout,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=uses_proxies(self.url)),
        )

    def max_tokens(self, sample: Sample, overhead: int) -> int | None:
        """Longest reply to ask for; raises EvaluationError where the prompt leaves no room."""
        extra = 0 if sample.raw else overhead
        wanted = sample.max_tokens or 1
        if self.context and sample.tokens + extra + wanted > self.context:
            raise EvaluationError(
                f"a prompt of {sample.tokens + extra} tokens and a reply of {wanted} exceed the "
                f"server's context of {self.context}; ask for shorter --lengths or serve the model "
                "with a longer --context-length"
            )
        if sample.max_tokens is None and self.context:
            # Templates that depend on the day may have a few tokens more than were counted.
            return max(1, self.context - sample.tokens - extra - 16)
        return sample.max_tokens

    async def ask(
        self,
        client: openai.AsyncOpenAI,
        sample: Sample,
        prompt: str,
        max_tokens: int | None,
        temperature: float,
    ) -> Reply:
        """Send one sample, by ``prompt``, one of PROMPTS; raises EvaluationError."""
        started = time.monotonic()
        if sample.ids:
            loss = await _awaited(self.url, self._loss(sample, client.timeout))
            return Reply("", sample.tokens, 1, time.monotonic() - started, loss)
        common = {"model": self.asked, "temperature": temperature}
        if max_tokens is not None:
            common["max_tokens"] = max_tokens
        reply = await _awaited(self.url, _reply(client, sample, prompt, common, self.template))
        return replace(reply, seconds=time.monotonic() - started)

    async def _loss(self, sample: Sample, timeout: Any) -> float:
        """Mean loss of the sample's last tokens, from SGLang's /generate."""
        body = {
            "input_ids": list(sample.ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": len(sample.ids) - sample.scored_tokens - 1,
        }
        if self.adapter is not None:
            body["lora_path"] = self.adapter
        async with httpx.AsyncClient(
            timeout=timeout, headers=_headers(), trust_env=uses_proxies(self.url)
        ) as client:
            reply = await client.post(f"{self.url}/generate", json=body)
        if reply.status_code in (404, 405):
            raise EvaluationError(
                f"perplexity: {self.url} has no /generate with log probabilities of the prompt, "
                "which only SGLang offers; leave the task out"
            )
        reply.raise_for_status()
        pairs = reply.json()["meta_info"]["input_token_logprobs"][-sample.scored_tokens :]
        if len(pairs) != sample.scored_tokens or any(pair[0] is None for pair in pairs):
            raise EvaluationError(
                f"perplexity: expected {sample.scored_tokens} log probabilities, "
                f"the server sent {len(pairs)}"
            )
        return -sum(pair[0] for pair in pairs) / len(pairs)


def _api_key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "none"


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {_api_key()}"}


def _card(card: Mapping[str, Any]) -> dict[str, Any]:
    """What ``/v1/models`` says of a model that decides how it is asked."""
    name, context, parent = card["id"], card.get("max_model_len"), card.get("parent")
    if not isinstance(name, str) or not isinstance(parent, str | None):
        raise TypeError(f"expected names, got {name!r} and {parent!r}")
    if not isinstance(context, int | None):
        raise TypeError(f"max_model_len: expected a whole number, got {context!r}")
    return {"id": name, "parent": parent, "context": context}


def _text_of(found: Mapping[str, Any], name: str) -> str | None:
    """A text that a server says of itself; None where it says another thing."""
    value = found.get(name)
    return value if isinstance(value, str) else None


def _pick(cards: Sequence[dict[str, Any]], model: str) -> dict[str, Any]:
    """The model of this name; raises EvaluationError where there is none."""
    names = [card["id"] for card in cards]
    if model not in names:
        raise EvaluationError(
            f"--served-model: expected one that the server lists, {', '.join(names)}, got {model}"
        )
    return cards[names.index(model)]


def _get(url: str, required: bool = False) -> dict[str, Any]:
    """The JSON object at an address; empty where there is none, unless it is required."""
    try:
        reply = httpx.get(url, timeout=30, headers=_headers(), trust_env=uses_proxies(url))
        reply.raise_for_status()
        found = reply.json()
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {str(found)[:40]!r}")
        return found
    # ImportError: a SOCKS proxy in the environment, without the package that httpx needs for it.
    # OSError: certificates that the environment names, and are not there.
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError, *MALFORMED) as error:
        if not required:
            return {}
        raise EvaluationError(
            f"--url: no OpenAI-compatible server answers at {url} ({_brief(error)}); start one, "
            "for example with `sglang serve`, and wait until it is ready"
        ) from error


def _chat(sample: Sample, prompt: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Messages of a sample, and what SGLang needs to go on with the reply's prescribed start."""
    if not sample.prefix:
        return [{"role": "user", "content": sample.prompt}], {}
    if prompt == "chat":
        return [{"role": "user", "content": f"{sample.prompt} {sample.prefix}"}], {}
    user = {"role": "user", "content": sample.prompt}
    assistant = {"role": "assistant", "content": sample.prefix}
    # What goes on with an answer is no thought, whatever a --reasoning-parser makes of it.
    return [user, assistant], {"continue_final_message": True, "separate_reasoning": False}


async def _reply(
    client: openai.AsyncOpenAI,
    sample: Sample,
    prompt: str,
    common: dict[str, Any],
    template: Mapping[str, Any],
) -> Reply:
    """The reply's text after the prescribed start, and the tokens of prompt and reply."""
    thought = False
    if sample.raw or prompt == "completion":
        text = f"{sample.prompt} {sample.prefix}".rstrip(" ")
        made = await client.completions.create(prompt=text, **common)
        reply = made.choices[0].text
    else:
        messages, extra = _chat(sample, prompt)
        if template:
            extra["chat_template_kwargs"] = dict(template)
        made = await client.chat.completions.create(messages=messages, extra_body=extra, **common)
        message = made.choices[0].message
        reply = message.content or ""
        # Under a reasoning parser, a reply without the end of a thought is one, whatever it says.
        if not reply.strip():
            names = ("reasoning_content", "reasoning")
            reply = next(filter(None, (getattr(message, name, None) for name in names)), "")
            thought = bool(reply)
    usage = made.usage
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    return Reply(
        reply.removeprefix(sample.prefix),
        *(int(count or 0) for count in counts),
        seconds=0,
        finish=str(made.choices[0].finish_reason or ""),
        thought=thought,
    )


async def _awaited(url: str, call: Awaitable[Result]) -> Result:
    """Await a request; what goes wrong on the server's side ends as one sentence."""
    try:
        return await call
    except (openai.APITimeoutError, httpx.TimeoutException) as error:
        raise EvaluationError(f"{url}: no reply in time; give a longer --timeout") from error
    except (openai.APIConnectionError, httpx.TransportError) as error:
        raise EvaluationError(f"{url}: the server does not answer any more") from error
    except (openai.APIStatusError, httpx.HTTPStatusError) as error:
        raise EvaluationError(
            f"{url}: the server refused a request (status {error.response.status_code}): "
            f"{_brief(error)}"
        ) from error
    except EvaluationError:
        raise
    except MALFORMED as error:
        raise EvaluationError(
            f"{url}: expected a reply as OpenAI's or SGLang's, got another ({_brief(error)})"
        ) from error


def _brief(error: Exception) -> str:
    response = getattr(error, "response", None) if not isinstance(error, httpx.HTTPError) else None
    text = response.text if response is not None else str(error)
    return " ".join(text.split())[:200]
