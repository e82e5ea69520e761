"""What ``make test-wheel`` runs in a fresh venv: an installed wheel serves the demo model."""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import httpx

import kascade_sglang
from kascade_sglang.servers.demo_model import MODEL_NAME, demo_arguments
from kascade_sglang.servers.process import Server, run_command
from kascade_sglang.text.documents import MAX_TOKENS, is_correct, make_document, messages


def main() -> int:
    """Ask one question; returns 1 unless the answer is right and sparse attention gave it."""
    assert Path(kascade_sglang.__file__).is_relative_to(sys.prefix), kascade_sglang.__file__
    document = make_document(1, 2000, lambda text: len(text) // 3, 1, ("single_key",))
    question = document.questions[0]
    body = {"model": MODEL_NAME, "messages": messages(document, question), "temperature": 0}
    log = Path(tempfile.mkdtemp(prefix="kascade-wheel-")) / "server.log"
    with Server(demo_arguments("kascade"), log) as server:
        reply = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={**body, "max_tokens": MAX_TOKENS},
            timeout=300,
            trust_env=False,
        )
        text = reply.raise_for_status().json()["choices"][0]["message"]["content"]
        reads = server.key_counters()
    right = is_correct(question, text)
    sparse = 0 < reads["prefill", "attended"] < reads["prefill", "dense"]
    releases = f"kascade-sglang {version('kascade-sglang')}, sglang {version('sglang')}"
    print(f"{releases}: {text!r} (right: {question.answer}), sparse: {sparse}")
    return 0 if right and sparse else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
