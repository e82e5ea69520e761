"""``make demo``: a real server answers questions over shared documents, sparse and then dense."""

import argparse
import asyncio
import csv
import io
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from kascade_sglang.calibration.hf_model import load_model, load_tokenizer, pick_device
from kascade_sglang.calibration.prompts import to_prompt
from kascade_sglang.calibration.selection import watch
from kascade_sglang.calibration.selection_page import check_target, write_page
from kascade_sglang.config import KascadeConfig, load_config
from kascade_sglang.errors import KascadeError
from kascade_sglang.files import why_unwritable
from kascade_sglang.host.dense import default_dense_backend
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import load_plan
from kascade_sglang.provenance import provenance
from kascade_sglang.servers.client import Answer, ask, ask_all, client_of
from kascade_sglang.servers.demo_model import MODEL, MODEL_NAME, demo_arguments
from kascade_sglang.servers.process import Server, run_command
from kascade_sglang.sparsity import key_reads
from kascade_sglang.text.documents import Document, make_document, messages

DOCUMENTS = 3
DOCUMENT_TOKENS = 4300
QUESTIONS_PER_TASK = 2
ASKED = ("single_key", "multi_key", "multi_hop", "which_document")
CONCURRENCY = 4
# One wrong reply in ten more than the dense backend's, and the demo has failed.
TOLERATED_LOSS = 0.1

console = Console(width=110)


@dataclass(frozen=True)
class Run:
    """One backend's replies. seconds: wall clock. reads: the server's own counters' growth."""

    backend: str
    answers: list[Answer]
    cold: list[Answer]
    seconds: float
    reads: dict[tuple[str, str], int]

    @property
    def accuracy(self) -> float:
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    def share_attended(self, phase: str) -> str:
        """Return keys attended to as a share of dense attention's, by the server's counters."""
        dense = self.reads.get((phase, "dense"))
        return f"{self.reads[phase, 'attended'] / dense:.1%}" if dense else "100.0%"


def documents() -> list[Document]:
    """Make the demo's documents; every run has the same."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return [
        make_document(seed, DOCUMENT_TOKENS, count_tokens, QUESTIONS_PER_TASK, ASKED)
        for seed in range(1, DOCUMENTS + 1)
    ]


def show(answer: Answer, config: KascadeConfig | None) -> None:
    """Print one reply, and for Kascade what its budget read."""
    mark = "[green]right[/]" if answer.correct else "[red]wrong[/]"
    console.print(f"  [bold]{escape(answer.question.text)}[/]")
    line = f"    {escape(answer.text)}  {mark}, {answer.cached_tokens} of {answer.prompt_tokens}"
    line += f" prompt tokens cached, {answer.total:.2f} s"
    if config:
        # The last token of a reply is never fed back, so it reads nothing.
        end = answer.prompt_tokens + answer.output_tokens - 1
        reads = key_reads(config, np.arange(answer.cached_tokens, end))
        share = reads.attended / reads.dense
        line += f", read {reads.attended:,} keys of {reads.dense:,} ({share:.0%})"
    console.print(line, soft_wrap=True, highlight=False)


async def question_server(
    server: Server, config: KascadeConfig | None
) -> tuple[list[Answer], list[Answer]]:
    """Ask everything: the first question of a document alone, the others concurrently."""
    answers, cold = [], []
    async with client_of(server.url) as client:
        for document in documents():
            console.print(f"[cyan]{escape(document.title)}[/], with facts hidden in it")
            first, *rest = document.questions
            cold.append(await ask(client, document, first))
            show(cold[-1], config)
            answers.append(cold[-1])
            answers += await ask_all(
                client, document, rest, CONCURRENCY, lambda answer: show(answer, config)
            )
    return answers, cold


def run_backend(backend: str, dense: str, config: KascadeConfig | None, log: Path) -> Run:
    """Start a server on this backend, question it and end it."""
    title = f"starting SGLang with --attention-backend {backend}"
    with ExitStack() as stack:
        status = stack.enter_context(console.status(title))

        def on_wait(seconds: float) -> None:
            status.update(f"{title}: {seconds:.0f} s, usually 30-100 s")

        arguments = demo_arguments(backend, dense)
        server = stack.enter_context(Server(arguments, log, on_wait=on_wait))
        status.stop()
        console.rule(f"--attention-backend {backend}")
        before = server.key_counters()
        started = time.monotonic()
        answers, cold = asyncio.run(question_server(server, config))
        seconds = time.monotonic() - started
        after = server.key_counters()
    reads = {key: value - before.get(key, 0) for key, value in after.items()}
    return Run(backend, answers, cold, seconds, reads)


def figures(run: Run) -> dict[str, str]:
    """Return the figures that the two runs are compared by."""
    warm = [answer for answer in run.answers if answer not in run.cold]
    prompts = sum(answer.prompt_tokens for answer in run.answers)
    return {
        "right answers": f"{run.accuracy:.1%}",
        "keys attended, prefill": run.share_attended("prefill"),
        "keys attended, decode": run.share_attended("decode"),
        "first token, new document, s": f"{median(a.first_token for a in run.cold):.2f}",
        "first token, cached document, s": f"{median(a.first_token for a in warm):.2f}",
        "prompt tokens cached": f"{sum(a.cached_tokens for a in run.answers) / prompts:.0%}",
        "all questions, s": f"{run.seconds:.1f}",
    }


def comparison(runs: list[Run]) -> Table:
    """Lay the runs side by side."""
    table = Table(title=f"{len(runs[0].answers)} questions over {DOCUMENTS} documents")
    table.add_column("--attention-backend")
    for run in runs:
        table.add_column(run.backend, justify="right")
    columns = [figures(run) for run in runs]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def record(runs: list[Run], folder: Path) -> None:
    """Write the figures to demo.csv and the table as a picture to demo.svg."""
    stamp = provenance()
    rows = [{"backend": run.backend, **figures(run), **stamp} for run in runs]
    with open(folder / "demo.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    picture = Console(record=True, width=64, file=io.StringIO())
    picture.print(comparison(runs))
    # Without the web fonts that rich names: a picture should load nothing.
    svg = re.sub(r"@font-face \{.*?\}", "", picture.export_svg(title="make demo"), flags=re.S)
    (folder / "demo.svg").write_text(svg)


def draw_selection(config: KascadeConfig, path: Path) -> None:
    """Answer the first question once more, offline, and draw what each layer read for it."""
    document = documents()[0]
    question = document.questions[0]
    # The plan names the model's folder, which says nothing to a reader.
    config = replace(config, plan=replace(config.plan, model=MODEL_NAME))
    disable_progress_bar()
    with console.status("drawing what was read: two minutes on a CPU"):
        model = load_model(str(MODEL), "auto", pick_device("auto"))
        tokenizer = load_tokenizer(str(MODEL))
        ids = to_prompt({"messages": messages(document, question)}, "demo", tokenizer, None, None)
        write_page(watch(model, config, ids.ids), tokenizer.decode, path, question.answer)
    console.print(f"what each layer read for the first answer: {path.resolve()}")


def failures(kascade: Run, dense: Run) -> list[str]:
    """Return what went wrong, one sentence each."""
    found = []
    for run in (kascade, dense):
        warm = [answer for answer in run.answers if answer not in run.cold]
        if not all(answer.cached_tokens >= DOCUMENT_TOKENS // 2 for answer in warm):
            found.append(f"{run.backend}: a later question did not use the cached document")
    if kascade.accuracy < dense.accuracy - TOLERATED_LOSS:
        found.append("kascade: more wrong answers than the dense backend")
    if not kascade.reads or any(
        kascade.reads[phase, "attended"] >= kascade.reads[phase, "dense"]
        for phase in ("prefill", "decode")
    ):
        found.append("kascade: attention was not sparse")
    return found


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write demo.csv and demo.svg")
    parser.add_argument("--dense", default=default_dense_backend(), help="backend to compare with")
    parser.add_argument("--page", type=Path, default=Path("demo.html"), help="what was read, drawn")
    options = parser.parse_args()
    check_target("--page", options.page, {})
    if options.record and (why := why_unwritable(options.record / "demo.csv")):
        raise KascadeError(f"--record {options.record}: {why}")
    plan = load_plan(MODEL / PLAN_NAME)
    config = load_config(str(MODEL), plan.shape)
    logs = Path(tempfile.mkdtemp(prefix="kascade-demo-"))
    console.print(f"server logs: {logs}")
    runs = [
        run_backend("kascade", options.dense, config, logs / "kascade.log"),
        run_backend(options.dense, options.dense, None, logs / "dense.log"),
    ]
    console.print(comparison(runs))
    if options.record:
        record(runs, options.record)
    draw_selection(config, options.page)
    problems = failures(*runs)
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
