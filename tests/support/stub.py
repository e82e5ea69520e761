"""A server in a thread that speaks what ``kascade eval`` asks for, with a model of our choice."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from kascade_sglang.evaluation.samples import Sample

MODEL = "stub"


class WordTokenizer:
    """One token a word; no chat template, no file to load."""

    bos_token_id = None
    chat_template = None

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for word in text.split():
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(self._words[index] for index in ids)


class Stub(ThreadingHTTPServer):
    """State of the server.

    answer: prompt as received -> reply. requests: bodies so far.
    instead: {path: body} of what is sent with status 200 in place of the right thing.
    reads: counters shown, as {(phase, kind): keys}; each request adds ``growth``.
    """

    def __init__(self, answer: Callable[[str], str], **settings: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.context: int | None = settings.get("context", 65536)
        self.growth: dict[tuple[str, str], int] = settings.get("growth", {})
        self.sglang: bool = settings.get("sglang", True)
        self.extra_tokens: int = settings.get("extra_tokens", 0)
        self.fail_after: int | None = settings.get("fail_after")
        self.instead: dict[str, Any] = settings.get("instead", {})
        self.loss: float = settings.get("loss", 2.0)
        self.as_thought: str | None = None  # the field that replies come in instead of ``content``
        self.reads = dict.fromkeys(self.growth, 0)
        self.requests: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *args: object) -> None:
        pass

    def send(self, body: Any, status: int = 200) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        stub = self.server
        if self.path in stub.instead:
            self.send(stub.instead[self.path])
        elif self.path == "/v1/models":
            self.send({"data": [{"id": MODEL, "max_model_len": stub.context}]})
        elif self.path == "/metrics/":
            lines = [
                f'kascade_key_reads_total{{phase="{phase}",kind="{kind}"}} {value}'
                for (phase, kind), value in stub.reads.items()
            ]
            self.send("# TYPE kascade_key_reads counter\n" + "\n".join(lines) + "\n")
        elif self.path == "/server_info" and stub.sglang:
            self.send({"attention_backend": "kascade"})
        else:
            self.send({"error": "not found"}, 404)

    def do_POST(self) -> None:
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if stub.fail_after is not None and len(stub.requests) >= stub.fail_after:
            return self.send({"error": {"message": "out of\nmemory"}}, 400)
        stub.requests.append(body)
        for key, value in stub.growth.items():
            stub.reads[key] += value
        if self.path in stub.instead:
            return self.send(stub.instead[self.path])
        if self.path == "/generate":
            return self.generate(body)
        if self.path == "/v1/completions":
            prompt = body["prompt"]
            choice: dict[str, Any] = {"text": stub.answer(prompt)}
        else:
            prompt = " ".join(message["content"] for message in body["messages"])
            said = {"content": stub.answer(prompt)}
            if stub.as_thought:
                said = {"content": None, stub.as_thought: said["content"]}
            choice = {"message": {"role": "assistant", **said}}
        count = len(prompt.split()) + stub.extra_tokens
        usage = {"prompt_tokens": count, "completion_tokens": 3, "total_tokens": count + 3}
        self.send({"id": "1", "model": MODEL, "choices": [choice], "usage": usage})

    def generate(self, body: dict[str, Any]) -> None:
        if not self.server.sglang:
            return self.send({"error": "not found"}, 404)
        count = len(body["input_ids"]) - body["logprob_start_len"]
        pairs = [[None, 0, None], *([[-self.server.loss, 0, None]] * (count - 1))]
        self.send({"meta_info": {"input_token_logprobs": pairs}})


@contextmanager
def serving(answer: Callable[[str], str], **settings: Any) -> Iterator[Stub]:
    stub = Stub(answer, **settings)
    thread = Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
        thread.join()


def perfect(samples: list[Sample], right: Callable[[Sample], str]) -> Callable[[str], str]:
    """A model that knows the reply to every sample, and says nothing to anything else."""
    known = {sample.prompt: right(sample) for sample in samples}

    def answer(prompt: str) -> str:
        return next((reply for text, reply in known.items() if text in prompt), "")

    return answer
