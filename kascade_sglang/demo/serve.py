"""``make serve``: keep the demo model's server up and print a line to try it with."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from kascade_sglang.servers.demo_model import MODEL, MODEL_NAME, demo_arguments
from kascade_sglang.servers.process import Server, require_free, run_command
from kascade_sglang.text.documents import MAX_TOKENS, make_document, messages


def main() -> None:
    """Serve until interrupted; raises ServerError where it does not start, or ends before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--backend", default="kascade")
    options, extra = parser.parse_known_args()
    require_free(options.port)
    folder = Path(tempfile.mkdtemp(prefix="kascade-serve-"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    document = make_document(1, 4000, lambda text: len(tokenizer.encode(text)), 1)
    question = document.questions[0]
    body = {"model": MODEL_NAME, "messages": messages(document, question), "max_tokens": MAX_TOKENS}
    request = folder / "request.json"
    request.write_text(json.dumps({**body, "temperature": 0}))
    print(f"starting; log: {folder / 'server.log'}", flush=True)
    with Server(
        demo_arguments(options.backend) + extra, folder / "server.log", options.port
    ) as server:
        print(f"\nserving at {server.url}; ask it (right answer: {question.answer}):\n")
        print(
            f"curl -s {server.url}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d @{request}\n\nCtrl-C ends the server.",
            flush=True,
        )
        try:
            server.require_running(None)
        except KeyboardInterrupt:
            print("ending the server")


if __name__ == "__main__":
    sys.exit(run_command(main))
