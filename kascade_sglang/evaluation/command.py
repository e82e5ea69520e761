"""``kascade eval``: options, and the run that they ask for. Heavy imports wait for the run."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kascade_sglang.errors import EvaluationError
from kascade_sglang.files import why_unwritable

if TYPE_CHECKING:
    from kascade_sglang.evaluation.endpoint import Endpoint
    from kascade_sglang.evaluation.harness import EvalSettings

SHORTEST = 256
"""Tokens of a prompt and its reply."""
EPILOG = """tasks: ruler = niah_single (niah_single_1 to _3), niah_multikey (_1 to _3),
niah_multivalue, niah_multiquery, vt, cwe, fwe and qa; perplexity (SGLang only); longbench and
longbench_DATASET (--longbench); aime (--aime); facts: what the demo model can answer."""


def add_eval(commands: "argparse._SubParsersAction") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "eval", help="measure a running server on long-context tasks", epilog=EPILOG
    )
    add = parser.add_argument
    add("--url", required=True, help="of the server, such as http://127.0.0.1:30000")
    add("--tasks", required=True, help="names with commas between them; see below")
    add("--lengths", type=int, nargs="+", default=[4096], help="tokens, reply included (4096)")
    add("--samples", type=int, default=20, help="of each task and length (20)")
    add("--seed", type=int, default=0, help="the same seed gives the same prompts (0)")
    add("--out", type=Path, required=True, help="CSV to append to; a run goes on where it ended")
    add("--tokenizer", "--model", help="folder or Hugging Face id (what the server names)")
    add(
        "--prompt",
        choices=("chat_prefix", "chat", "completion"),
        default="chat_prefix",
        help="chat whose reply starts as RULER prescribes (SGLang; the default), chat whose user "
        "message ends with that start (any server), or text to continue (base models)",
    )
    add("--squad", type=Path, help="file in SQuAD's format for qa (invented passages)")
    add("--longbench", type=Path, help="folder with LongBench's files, qasper.jsonl and so on")
    add("--aime", type=Path, help=".jsonl with problem and answer")
    add("--text", type=Path, help="text file for perplexity (the bundled books)")
    add(
        "--served-model", metavar="NAME", help="which of the server's models (its first base model)"
    )
    add(
        "--chat-template-kwargs",
        type=_object,
        default={},
        metavar="JSON",
        help="for the chat template, as in '{\"enable_thinking\": false}' (SGLang, vLLM)",
    )
    add("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    add("--label", help="names the run in results (the server's attention backend)")
    add("--note", default="", help="a remark that every row keeps, such as what the server runs on")
    add("--concurrency", type=int, default=4, help="requests in flight (4)")
    add("--temperature", type=float, default=0.0, help="of sampling (0)")
    add("--max-tokens", type=int, help="longest reply (what the benchmark prescribes)")
    add("--timeout", type=float, default=3600, help="seconds for one reply (3600)")
    add("--plot", type=Path, help="also draw scores against lengths, .png, .svg or .pdf")
    add(
        "--report",
        type=Path,
        metavar="PAGE.html",
        help="also draw what each layer reads of the first prompt: answered again offline, on the "
        "CPU, with the weights in the folder of --tokenizer, by the plan and the KASCADE_ "
        "variables found here",
    )
    parser.set_defaults(run=evaluate)


def _object(text: str) -> dict[str, Any]:
    """Parse a JSON object; argparse reports what is raised as a usage error."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return found


def evaluate(args: argparse.Namespace) -> None:
    """Run the tasks; the table goes to stdout, progress to stderr. Raises EvaluationError."""
    _check(args)
    from rich.console import Console

    from kascade_sglang.evaluation.endpoint import Endpoint
    from kascade_sglang.evaluation.harness import LOUD, Harness
    from kascade_sglang.evaluation.registry import groups, pick
    from kascade_sglang.evaluation.results import Results
    from kascade_sglang.evaluation.samples import Order
    from kascade_sglang.evaluation.show import check_drawable, plot, summary, table
    from kascade_sglang.evaluation.tokens import Tokens

    known = groups(args.squad, args.aime, args.longbench, args.text)
    tasks = pick([name.strip() for name in args.tasks.split(",") if name.strip()], known)
    drawn = None
    if args.report is not None:
        from kascade_sglang.evaluation.picture import pick_task

        drawn = pick_task(tasks)
    endpoint = Endpoint.probe(args.url, args.served_model, args.chat_template_kwargs)
    if endpoint.others:
        print(
            f"kascade: asking {endpoint.model}; --served-model names another of "
            f"{', '.join(endpoint.others)}",
            file=sys.stderr,
        )
    tokens = Tokens.load(
        _tokenizer(args, endpoint), args.chat_template_kwargs, args.trust_remote_code
    )
    results = Results(args.out)
    if args.plot is not None:
        planned = [{"length": task.by_length, "metric": task.metric} for task in tasks]
        check_drawable(args.plot, [*results.rows(), *planned])
    harness = Harness(endpoint, tokens, _settings(args, endpoint), results, _Progress())
    try:
        rows = harness.run(tasks)
    except KeyboardInterrupt:
        print(
            f"\nkascade: stopped; {args.out} keeps {len(results.rows())} rows and every reply so "
            "far; run the same command again to go on",
            file=sys.stderr,
        )
        raise
    # Rows of other runs in the same file are what these are to be compared with.
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table(results.rows()))
    if len({row["label"] for row in results.rows()}) > 1:
        console.print(summary(results.rows()))
    for row in rows:
        if any(note in row["note"] for note in LOUD):
            where = f"{row['task']} {row['length']}".strip()
            print(f"kascade: warning: {where}: {row['note']}", file=sys.stderr)
    if args.plot is not None:
        plot(results.rows(), args.plot)
    if drawn is not None:
        from kascade_sglang.evaluation.picture import draw_first_sample

        length = args.lengths[0] if drawn.by_length else None
        order = Order(length, 1, args.seed, tokens, endpoint.context)
        print(f"kascade: drawing a prompt of {drawn.name}", file=sys.stderr)
        folder = _tokenizer(args, endpoint)
        draw_first_sample(folder, drawn, order, args.report, args.trust_remote_code)


def _check(args: argparse.Namespace) -> None:
    """Refuse wrong options before anything is loaded or asked."""
    for name in ("samples", "concurrency", "max_tokens", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            flag = name.replace("_", "-")
            raise EvaluationError(f"--{flag}: expected a number above 0, got {value}")
    for name in ("label", "note"):
        try:
            (getattr(args, name) or "").encode()
        except UnicodeEncodeError as error:
            raise EvaluationError(f"--{name}: expected text in UTF-8, got other bytes") from error
    if not 0 <= args.temperature < math.inf:
        raise EvaluationError(f"--temperature: expected 0 or more, got {args.temperature}")
    for length in args.lengths:
        if length < SHORTEST:
            raise EvaluationError(f"--lengths: expected at least {SHORTEST} tokens, got {length}")
    if args.chat_template_kwargs and args.prompt == "completion":
        raise EvaluationError(
            "--chat-template-kwargs: expected --prompt chat_prefix or chat, got completion, which "
            "uses no template; drop one"
        )
    if why := why_unwritable(args.out):
        raise EvaluationError(f"--out {args.out}: {why}")
    if args.plot is not None:
        from kascade_sglang.evaluation.show import check_target

        check_target(args.plot, args.out)
    if args.report is not None:
        from kascade_sglang.calibration.selection_page import check_target as check_page

        check_page("--report", args.report, {"--out": args.out, "--plot": args.plot})


def _tokenizer(args: argparse.Namespace, endpoint: "Endpoint") -> str:
    path = args.tokenizer or endpoint.tokenizer
    if not path:
        raise EvaluationError(
            f"--tokenizer: {args.url} does not say which it uses; give the served model's folder"
        )
    return path


def _settings(args: argparse.Namespace, endpoint: "Endpoint") -> "EvalSettings":
    from kascade_sglang.evaluation.harness import EvalSettings

    return EvalSettings(
        lengths=tuple(dict.fromkeys(args.lengths)),
        samples=args.samples,
        seed=args.seed,
        prompt=args.prompt,
        concurrency=args.concurrency,
        temperature=args.temperature,
        timeout=args.timeout,
        max_tokens=args.max_tokens,
        label=args.label or endpoint.backend,
        note=args.note,
    )


class _Progress:
    """A bar a task with the time left, on a terminal; elsewhere one line a task."""

    def __call__(self, task: str, length: int | None, done: int, count: int) -> None:
        """Show a reply; the first of a task begins its bar."""
        from tqdm import tqdm

        where = f"{task} {length or ''}".strip()
        shown = sys.stderr.isatty()
        if done == 1:
            self._bar = tqdm(total=count, desc=where, unit="reply", disable=not shown)
        self._bar.update()
        if done == count:
            self._bar.close()
            if not shown:
                print(f"{where}: {done} of {count}", file=sys.stderr, flush=True)
