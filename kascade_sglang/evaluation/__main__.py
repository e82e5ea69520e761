"""``make eval``: ask the same questions under every method; write a table and a plot.

Every row of the CSV is one method, task and length. Accuracy is the share of replies that hold
the right value. A method's rows are added when it is done, so an interrupted run keeps them; the
table and the plot take the newest of a cell.
"""

import argparse
import asyncio
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers import AutoTokenizer

from kascade_sglang.evaluation.comparison import plot, summary
from kascade_sglang.evaluation.methods import Method, all_methods, server_arguments
from kascade_sglang.files import append_csv
from kascade_sglang.host.dense import default_dense_backend
from kascade_sglang.provenance import provenance
from kascade_sglang.servers.client import Answer, ask_all, client_of
from kascade_sglang.servers.counters import share_attended
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.servers.process import Server, run_command
from kascade_sglang.text.documents import TASKS, Document, make_document

RESULTS = Path("benchmarks/results")
COLUMNS = """method heads ratio task length accuracy n attended
    device dtype versions commit date""".split()
CONCURRENCY = 4


def make_documents(length: int, count: int, questions: int) -> list[Document]:
    """Make documents of just under ``length`` tokens; seeds depend on the length alone."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return [
        make_document(1000 * length + index, length, count_tokens, questions)
        for index in range(count)
    ]


async def answer_documents(url: str, documents: list[Document], bar: Any) -> list[Answer]:
    """Ask every question; one document at a time, so that its questions share its prefix."""
    answers: list[Answer] = []
    async with client_of(url) as client:
        for document in documents:
            first, *rest = document.questions
            for part in ([first], rest):
                answers += await ask_all(
                    client, document, part, CONCURRENCY, lambda answer: bar.update()
                )
    return answers


def evaluate(
    method: Method, dense: str, documents: dict[int, list[Document]], folder: Path, bar: Any
) -> list[dict[str, Any]]:
    """Start the method's server, ask everything and return its rows."""
    arguments, environment = server_arguments(method, dense, folder)
    log = folder / f"{method.label.replace(' ', '_')}.log"
    rows = ask_server(arguments, environment, documents, log, bar)
    named = {"method": method.name, "heads": method.heads or "", "ratio": method.ratio or ""}
    return [{**named, **row} for row in rows]


def ask_server(
    arguments: list[str],
    environment: dict[str, str],
    documents: dict[int, list[Document]],
    log: Path,
    bar: Any,
) -> list[dict[str, Any]]:
    """Start a server, ask everything and return a row for each length and task."""
    rows = []
    with Server(arguments, log, environment=environment) as server:
        for length, group in documents.items():
            before = server.key_counters()
            answers = asyncio.run(answer_documents(server.url, group, bar))
            # Without counters the backend is a dense one.
            attended = share_attended(before, server.key_counters()) or 1.0
            for task in TASKS:
                replies = [answer for answer in answers if answer.question.task == task]
                right = sum(answer.correct for answer in replies)
                rows.append(
                    {
                        "task": task,
                        "length": length,
                        "accuracy": round(right / len(replies), 4),
                        "n": len(replies),
                        "attended": round(attended, 4),
                    }
                )
    return rows


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make eval", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--documents", type=int, default=4, help="documents per length")
    parser.add_argument("--questions", type=int, default=5, help="questions per task and document")
    names = list(dict.fromkeys(method.name for method in all_methods([1.0])))
    parser.add_argument("--only", nargs="+", choices=names, help="run these")
    parser.add_argument("--dense", default=default_dense_backend(), help="the dense backend")
    parser.add_argument("--parallel", type=int, default=1, help="servers to run side by side")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_demo.csv")
    parser.add_argument("--commit", help="what to write as the commit, outside a repository")
    return parser.parse_args()


def main() -> int:
    """Run the grid; returns the exit status."""
    options = parse_arguments()
    methods = [
        method
        for method in all_methods(options.ratios)
        if not options.only or method.name in options.only
    ]
    documents = {
        length: make_documents(length, options.documents, options.questions)
        for length in options.lengths
    }
    total = len(methods) * sum(len(d.questions) for group in documents.values() for d in group)
    folder = Path(tempfile.mkdtemp(prefix="kascade-eval-"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    stamp = provenance(options.commit)
    with (
        tqdm(total=total, unit="question") as bar,
        ThreadPoolExecutor(options.parallel) as pool,
    ):

        def run(method: Method) -> list[dict[str, Any]]:
            return evaluate(method, options.dense, documents, folder, bar)

        for rows in pool.map(run, methods):
            append_csv(options.out, COLUMNS, [{**row, **stamp} for row in rows])
    Console(width=110).print(summary(options.out))
    plot(options.out, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
