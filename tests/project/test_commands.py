"""What the documents show can be typed: each command is read by its own parser, flags exist."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from kascade_sglang import bench, cli
from kascade_sglang.settings import SETTINGS
from tests.support.documents import ROOT, blocks, documents, without_blocks

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*(?!\w|-|\.\w)")
CODE = re.compile(r"`([^`\n]+)`")
SERVER = "sglang.launch_server"
BENCH = bench.__name__
VERBS = ["doctor", "calibrate", "eval", "plan show", "plan check", "plan diff", "plan report"]
VERBS.append("plan import")
LM_EVAL = {"--tasks", "--limit", "--metadata", "--model_args", "--apply_chat_template"}


class Command(NamedTuple):
    """A command line of ours or of SGLang's. whole: from a block, so that nothing is left out."""

    where: str
    program: str
    words: list[str]
    whole: bool


def lines() -> Iterator[tuple[str, str, bool]]:
    """Yield where a line of shell stands, the line, and whether it is one of a block."""
    for path in documents():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        for block in blocks(text):
            if block.language == "sh":
                for line in block.text.replace("\\\n", " ").splitlines():
                    yield f"{name}:{block.line}", line, True
        for code in CODE.findall(without_blocks(text)):
            yield name, code, False


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return what a command line starts, and its arguments."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["kascade", *rest]:
            return "kascade", rest
        case ["sglang", "serve", *rest]:
            return SERVER, rest
        case [python, "-m", module, *rest] if python.rpartition("/")[2] == "python":
            return module, rest
    return None


def commands() -> list[Command]:
    """Every command that the documents show."""
    found = []
    for where, line, whole in lines():
        try:
            words = shlex.split(line, comments=whole)
        except ValueError:  # Half a quotation, in code that is no shell.
            continue
        if (program := program_of(words)) is not None:
            found.append(Command(f"{where} {line.strip()[:50]}", *program, whole))
    return found


@cache
def parser_of_servers() -> argparse.ArgumentParser:
    load_plugins()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    return parser


def with_parser(module: str) -> str | None:
    """Return what ``python -m`` runs of a module of ours, None where it takes no arguments."""
    path = ROOT / module.replace(".", "/")
    if path.is_dir():
        path, module = path / "__main__", f"{module}.__main__"
    text = path.with_suffix(".py").read_text()
    return module if "parse_args()" in text or "parse_args(arg" in text else None


@cache
def help_of(program: str) -> str:
    """Return the help of a program of ours; of ``kascade``, that of all its commands."""
    if program == SERVER:
        return parser_of_servers().format_help()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        if program == "kascade":
            for verb in VERBS:
                with contextlib.suppress(SystemExit):
                    cli.main([*verb.split(), "--help"])
        elif module := with_parser(program):
            patch.setattr(sys, "argv", [program, "--help"])
            with contextlib.suppress(SystemExit):
                importlib.import_module(module).main()
    return printed.getvalue()


class ReadIt(Exception):
    """Ends a command once it has read its arguments."""


def read(module: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Let a module of ours read its arguments, and no more; raises SystemExit for wrong ones."""
    parse = argparse.ArgumentParser.parse_args

    def and_stop(parser: argparse.ArgumentParser, *given: object) -> None:
        parser.allow_abbrev = False
        parse(parser, *given)
        raise ReadIt

    patch.setattr(argparse.ArgumentParser, "parse_args", and_stop)
    patch.setattr(sys, "argv", [module, *words])
    with pytest.raises(ReadIt):
        importlib.import_module(module).main()


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.where)
def test_commands_are_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, words, whole = command
    if program == BENCH:
        assert words and (words[0] in bench.TOOLS or words[0] == f"{{{','.join(bench.TOOLS)}}}")
    elif program in ("kascade", SERVER) and not whole:  # ``kascade calibrate ...`` in a sentence.
        known = set(FLAG.findall(help_of(program))) | {"--help", "--version"}
        assert set(FLAG.findall(" ".join(words))) <= known
        assert program == SERVER or {*words[:1]} <= {verb.split()[0] for verb in VERBS} | known
    elif program == "kascade":
        assert callable(cli._parser().parse_args(words).run)
    elif program == SERVER:
        assert parser_of_servers().parse_args(words).attention_backend == "kascade"
    elif module := with_parser(program):
        read(module, words, monkeypatch)
    else:
        assert words == []


def test_commands_of_all_kinds_are_shown() -> None:
    shown = commands()
    assert len(shown) > 60
    verbs = {
        command.words[0] for command in shown if command.program == "kascade" and command.whole
    }
    assert {"doctor", "calibrate", "eval"} <= verbs
    programs = {command.program for command in shown}
    assert {SERVER, BENCH, "benchmarks.bench_serving", "benchmarks.ablations"} <= programs


def test_what_is_gone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        read("benchmarks.ablations", ["--parallels", "5"], monkeypatch)
    with pytest.raises(SystemExit):
        parser_of_servers().parse_args(["--model-path", "M", "--kascade-top-k", "5"])
    assert "--anchors" in help_of("kascade") and "--anchor" not in FLAG.findall(help_of("kascade"))


def programs() -> list[str]:
    """Everything of ours that takes flags, and SGLang's server."""
    found = {command.program for command in commands()} - {BENCH}
    folders = {
        "benchmarks": "benchmarks",
        "kascade_sglang/demo/recipe": "kascade_sglang.demo.recipe",
    }
    for folder, package in folders.items():
        modules = [f"{package}.{path.stem}" for path in (ROOT / folder).glob("[a-z]*.py")]
        found |= {module for module in modules if with_parser(module)}
    return sorted(found)


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    return {flag for program in programs() for flag in FLAG.findall(help_of(program))}


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_exist(path: Path, known_flags: set[str]) -> None:
    ours = {setting.flag.split()[0] for setting in SETTINGS.values() if setting.about.flag}
    named = set(FLAG.findall(path.read_text()))
    assert {flag for flag in named if flag.startswith("--kascade-")} <= ours
    assert named <= known_flags | LM_EVAL | {"--help", "--version"}
