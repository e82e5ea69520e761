"""The ``kascade`` command.

Whatever the user can mend ends as one line on stderr and exit status 1. Only the commands that
run or read a model import torch.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kascade_kernels.budget import Budget
from kascade_sglang.errors import KascadeError, sentence
from kascade_sglang.evaluation.command import add_eval
from kascade_sglang.files import why_unwritable
from kascade_sglang.plan.library import read_plan
from kascade_sglang.plan.schema import HEAD_MODES, POOL_SHARE, Plan, PlanError
from kascade_sglang.settings import read_settings

if TYPE_CHECKING:
    from kascade_sglang.plan.schema import ModelShape


_ABOUT = "Check a machine; calibrate a model; evaluate a server; show and check plans."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="kascade: %(message)s", level=logging.WARNING)
    args = _read(argv)
    try:
        read_settings(None)  # Refuses a variable of ours that cannot be read.
        status = args.run(args)
        sys.stdout.flush()
    except KascadeError as error:
        print(f"kascade: {sentence(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `kascade plan show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status or 0


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; flags that nothing knows are an error, as with ``parse_args``."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = "; flags of the server go after --" if args.run is _doctor else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def _anchor_list(text: str) -> tuple[int, ...]:
    """Parse ``0,2,8``; argparse reports what is raised as a usage error."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        what = f"expected layers with commas between them, such as 0,2,8, got {text!r}"
        raise argparse.ArgumentTypeError(what) from error


def _anchor_count_or_list(text: str) -> int | tuple[int, ...]:
    """Parse ``5`` or ``0,2,8``."""
    layers = _anchor_list(text)
    return layers if "," in text else layers[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kascade", description=_ABOUT)
    about = {"action": _Version, "nargs": 0, "default": argparse.SUPPRESS}
    parser.add_argument("--version", help="print versions and the GPU", **about)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_calibrate(commands)
    add_eval(commands)
    plan = commands.add_parser("plan", help="show, compare, draw, check or import plans")
    _add_plan_commands(plan.add_subparsers(required=True, metavar="COMMAND"))
    return parser


class _Version(argparse.Action):
    """Print versions and exit: torch, which is asked for the GPU, is imported for this alone."""

    def __call__(self, *_: Any) -> None:
        from kascade_sglang.doctor import version_line

        print(version_line())
        raise SystemExit(0)


def _add_doctor(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "doctor", help="say whether this machine can serve, and how to mend what cannot"
    )
    parser.add_argument("--model", help="folder or Hugging Face id that it should serve")
    parser.add_argument(
        "flags", nargs="*", metavar="-- FLAGS", help="flags that the server will get, after --"
    )
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console

    from kascade_sglang.doctor import diagnose, show

    return show(diagnose(args.model, args.flags), Console())


def _add_calibrate(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser("calibrate", help="measure a model and write its plan")
    add = parser.add_argument
    add("--model", required=True, help="folder or Hugging Face id")
    add(
        "--anchors",
        type=_anchor_count_or_list,
        metavar="K | 0,2,8",
        help="how many anchor layers to pick, layer 0 included, or the layers themselves; default: "
        "the fewest whose answers diverge at most twice as much as where every layer selects",
    )
    add(
        "--makers",
        type=lambda text: text if text == "auto" else _anchor_list(text),
        default=(),
        metavar="auto | 3,9",
        help="which of the --anchors leave a candidate pool, that the anchors after them score "
        "alone in decoding; auto: the fewest by which answers lose little; default: none",
    )
    add("--pool-share", type=float, default=POOL_SHARE, help="share of the keys in a pool (0.25)")
    add("--out", required=True, type=Path, help="the plan file to write")
    add("--report", type=Path, help="also draw a page about it: .png, .svg or .html")
    add("--device", default="auto", help="auto (the default), cpu, cuda, ...")
    add("--device-map", metavar="auto", help="spread the model over all GPUs, with accelerate")
    _add_trust(parser)
    add("--dtype", default="auto", help="auto (the default), float32, bfloat16 or float16")
    add("--tiles", type=int, default=64, help="query tiles to measure in each prompt (64)")
    add(
        "--criterion",
        default="kl",
        help="what to choose anchors by: kl (the default), divergence of the model's answers where "
        "all layers are sparse, or mass, attention recovered times importance, the paper's",
    )
    _add_source(parser)
    _add_budget(parser)
    parser.set_defaults(run=_calibrate)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        help=".jsonl with one object a line (text, prompt, messages or conversations), a .json "
        "array of them, or a text file, which is cut into prompts of --max-tokens; each may be "
        ".gz; without it and --dataset, chats that are made",
    )
    add("--dataset", help="Hugging Face data set to draw prompts from")
    add("--dataset-config", metavar="NAME", help="one of the data set's configurations")
    add("--split", default="train", help="of the data set (train)")
    add("--field", help="its column of text, where that is not text, prompt or messages")
    add("--max-tokens", type=int, help="cut prompts to this many tokens")
    add("--limit", type=int, help="use this many prompts, drawn with the seed (file: all; else 10)")
    add("--seed", type=int, default=0, help="of the tiles and prompts drawn (0)")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topk-ratio",
        type=float,
        default=0.1,
        help="share of the context that a position attends to (0.1)",
    )
    parser.add_argument("--min-k", type=int, default=128, help="least number of keys (128)")
    parser.add_argument(
        "--heads",
        choices=HEAD_MODES,
        default="per_head",
        help="one selection for each KV head (the default) or one for all",
    )


def _add_plan_commands(commands: "argparse._SubParsersAction") -> None:
    show = commands.add_parser("show", help="print a plan as a table")
    diff = commands.add_parser("diff", help="say how two plans differ; exit status 1 if they do")
    for name in ("a", "b"):
        diff.add_argument(name, type=Path, help="plan (.json), head map (.npy) or preset:NAME")
    diff.set_defaults(run=_diff)
    report = commands.add_parser("report", help="draw a calibrated plan's measurements")
    report.add_argument("--out", required=True, type=Path, help="the page: .png, .svg or .html")
    check = commands.add_parser("check", help="say whether a plan can be used")
    check.add_argument("--model", help="folder or Hugging Face id that it must fit")
    _add_trust(check)
    convert = commands.add_parser(
        "import", help="convert a head map of microsoft/kascade (.npy) to a plan"
    )
    convert.add_argument("--model", required=True, help="folder or Hugging Face id it is for")
    convert.add_argument("--out", required=True, type=Path, help="the plan file to write")
    _add_trust(convert)
    _add_budget(convert)
    for parser, run in ((show, _show), (check, _check), (report, _report), (convert, _import)):
        kinds = (
            "head map (.npy)"
            if parser is convert
            else "plan (.json), head map (.npy) or preset:NAME"
        )
        parser.add_argument("path", type=Path, help=kinds)
        parser.add_argument(
            "--anchors",
            type=_anchor_list,
            metavar="0,2,8",
            help="anchors of a head map whose file name does not end in _layers_0_2_8.npy",
        )
        parser.set_defaults(run=run)


def _calibrate(args: argparse.Namespace) -> None:
    from kascade_sglang.calibration.run import CalibrationConfig, calibrate
    from kascade_sglang.calibration.sources import PromptSource
    from kascade_sglang.plan.table import choice_table, rank_table

    options = {name: value for name, value in vars(args).items() if name != "run"}
    source = PromptSource(**{item.name: options.pop(item.name) for item in fields(PromptSource)})
    plan = calibrate(CalibrationConfig(source=source, **options))
    lines = [f"{args.out}: anchors {_numbers(plan.anchors)}", *choice_table(plan)]
    print("\n".join([*lines, *rank_table(plan)]))


def _load(args: argparse.Namespace, shape: "ModelShape | None" = None) -> Plan:
    if args.path.suffix != ".npy" and args.anchors is not None:
        raise PlanError("--anchors: only for .npy head maps; a plan file names its own")
    return _load_path(args.path, args.anchors, shape)


def _load_path(
    path: Path, anchors: tuple[int, ...] | None = None, shape: "ModelShape | None" = None
) -> Plan:
    if path.suffix != ".npy":
        return read_plan(str(path))
    from kascade_sglang.plan.npy import plan_from_npy

    return plan_from_npy(path, anchors, shape=shape)


def _model_shape(model: str, trust_remote_code: bool) -> "ModelShape":
    from kascade_sglang.calibration.hf_model import read_config, shape_of

    return shape_of(read_config(model, trust_remote_code))


def _show(args: argparse.Namespace) -> None:
    from kascade_sglang.plan.table import describe

    print(describe(_load(args)))


def _check(args: argparse.Namespace) -> None:
    named = args.model is not None
    shape = _model_shape(args.model, args.trust_remote_code) if named else None
    plan = _load(args, shape)
    if shape is not None:
        plan.check_fits(shape)
    fits = f"fits {args.model}" if named else "no --model to compare with"
    print(f"ok: {args.path}: {plan.shape.layers} layers, anchors {_numbers(plan.anchors)}; {fits}")


def _diff(args: argparse.Namespace) -> int:
    from kascade_sglang.plan.diff import differences

    lines = differences(_load_path(args.a), _load_path(args.b))
    print("\n".join(lines) or f"same: {args.a} and {args.b}")
    return 1 if lines else 0


def _report(args: argparse.Namespace) -> None:
    from kascade_sglang.plan.report import check_target, write_report

    plan = _load(args)
    check_target("--out", args.out, {"the plan": args.path})
    write_report(plan, args.out)
    print(args.out)


def _import(args: argparse.Namespace) -> None:
    from kascade_sglang.calibration.hf_model import name_of
    from kascade_sglang.plan.npy import plan_from_npy

    if why := why_unwritable(args.out, {"the head map": args.path}):
        raise PlanError(f"--out {args.out}: {why}")
    try:
        budget = Budget(args.topk_ratio, args.min_k)
    except ValueError as error:
        raise PlanError(str(error)) from error
    shape = _model_shape(args.model, args.trust_remote_code)
    name = name_of(args.model)
    plan = plan_from_npy(args.path, args.anchors, name, shape, budget, args.heads)
    try:
        plan.save(args.out)
    except OSError as error:
        raise PlanError(f"--out {args.out}: cannot write ({error.strerror})") from error
    print(f"{args.out}: anchors {_numbers(plan.anchors)}")


def _numbers(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


if __name__ == "__main__":
    sys.exit(main())
