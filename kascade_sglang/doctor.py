"""``kascade doctor``: say whether this machine can serve, and which command mends what cannot.

It holds no rule of its own. Releases, hooks, plan, settings and model are judged by what a server
judges them by when it starts; here nothing is started, and every failure is said with its cure.
"""

import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kascade_kernels.budget import TILE
from kascade_sglang.config import MB, KascadeConfig
from kascade_sglang.errors import KascadeError
from kascade_sglang.files import expand
from kascade_sglang.host.dense import default_dense_backend, missing_library
from kascade_sglang.host.release import require_supported_host
from kascade_sglang.plan.library import locate_plan, shipped_plans
from kascade_sglang.plan.presets import PRESETS, warning_of
from kascade_sglang.provenance import ABSENT, device_name, versions
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.settings import read_settings
from kascade_sglang.text.reading import is_hub_id, why_no_model

if TYPE_CHECKING:
    from kascade_sglang.host.facts import ServerFacts

OURS = "kascade-sglang"
HELP = "python -m sglang.launch_server --help"
GPU_NODES = "nvidia[0-9]*"
"""Devices that a machine with a usable NVIDIA GPU has in ``/dev``."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    cure: the command, or the change of a command, that mends it; empty where all is well.
    note: worth knowing, but a server starts without the cure.
    """

    subject: str
    text: str
    cure: str = ""
    note: bool = False

    @property
    def failed(self) -> bool:
        """Whether no server with Kascade would start."""
        return bool(self.cure) and not self.note


def diagnose(model: str | None = None, flags: Sequence[str] = ()) -> list[Finding]:
    """Check this machine, and whether a model can be served on it.

    model: folder or hub id; None takes the demo's for what a server's arguments prove.
    flags: those that the server will get.
    """
    found = [*_packages(), _release(), _device()]
    failed = any(each.failed for each in found)
    if failed:
        # Nothing of SGLang's can be relied on, so importing it would only add a traceback.
        return [*found, Finding("plugin", "not checked: mend what failed first", note=True)]
    with redirect_stderr(io.StringIO()):  # What SGLang warns of on a machine without a GPU.
        return [*found, *_plugin(), *_server(model, flags)]


def show(findings: Sequence[Finding], console: Console) -> int:
    """Print the report; returns the exit status, 1 if anything failed."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for name, style in (("", "bold"), ("checked", "bold"), ("found", "")):
        table.add_column(name, style=style, overflow="fold")
    for each in findings:
        mark = "[red]FAILED[/]" if each.failed else "[yellow]note[/]" if each.note else "ok"
        table.add_row(mark, each.subject, escape(each.text))
    console.print(table, markup=True)
    # Below the table, on lines of their own: commands are there to be copied.
    for each in findings:
        if each.cure:
            console.print(f"\n{each.subject}:\n    {each.cure}", markup=False, soft_wrap=True)
    failed = sum(each.failed for each in findings)
    verdict = f"{failed} of {len(findings)} checks failed" if failed else "ready to serve"
    console.print(f"\n{verdict}", markup=False)
    return 1 if failed else 0


def version_line() -> str:
    """Return what ``kascade --version`` prints: packages and the device."""
    found = [f"{package} {release}" for package, release in versions().items()]
    return ", ".join([*found, device_name()])


def _source() -> str:
    """Return what pip installs this package from: a checkout, a wheel's address or a name."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "setup.py").is_file():
        return f"-e {checkout}"
    try:
        origin = distribution(OURS).read_text("direct_url.json")
        return json.loads(origin)["url"] if origin else OURS
    except PackageNotFoundError:
        return OURS


def _reinstall() -> str:
    """Return the command that makes an installation of this package whole again."""
    return f"pip install --force-reinstall --no-deps {_source()}"


def _packages() -> Iterator[Finding]:
    """Check what this package's own metadata asks for; the releases that matter have a line."""
    named = versions()
    del named["sglang"]
    try:
        wanted = [Requirement(each) for each in requires(OURS) or []]
    except PackageNotFoundError:
        yield Finding("kascade", f"the package {OURS} is not installed", f"pip install {_source()}")
        return
    for need in wanted:
        judged = need.name == "sglang"  # Release by release, below.
        if judged or need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            release = version(need.name)
        except PackageNotFoundError:
            release = None
        if release is None or not need.specifier.contains(release, prereleases=True):
            text = f"expected {need.name}{need.specifier}, got {release or 'none'}"
            yield Finding(need.name, text, f"pip install '{need.name}{need.specifier}'")
            named.pop(need.name, None)
    for package, release in named.items():
        # Torch says which release of Triton it works with, so pip is asked for torch.
        cure = (
            "" if release != ABSENT else f"pip install --force-reinstall torch=={_torch_release()}"
        )
        yield Finding(package, release, cure)


def _torch_release() -> str:
    return torch.__version__.partition("+")[0]


def _release() -> Finding:
    try:
        require_supported_host()
        return Finding("sglang", f"{version('sglang')}, a verified release")
    except PackageNotFoundError:
        return Finding("sglang", "not installed", f"pip install {_source()}")
    except KascadeError as error:
        return _refusal("sglang", str(error))


def _device() -> Finding:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        text = f"{device_name()}, sm_{major}{minor}, {free / 2**30:.1f} GiB free of "
        return Finding("GPU", f"{text}{total / 2**30:.1f}")
    nodes = sorted(Path("/dev").glob(GPU_NODES))
    if nodes and torch.version.cuda is None:
        text = f"{nodes[0]} is there, and this torch ({torch.__version__}) has no CUDA"
        return Finding("GPU", text, f"pip install --force-reinstall torch=={_torch_release()}")
    text = "none: attention runs through the torch reference, on the CPU; right, and slow"
    if nodes:
        text += f" ({nodes[0]} is there; is CUDA_VISIBLE_DEVICES empty, or the driver too old?)"
    return Finding("GPU", text, note=True)


def _plugin() -> Iterator[Finding]:
    """Load the plugin as SGLang does, and ask SGLang which hooks it has put in place."""
    from kascade_sglang.host import command_line, server

    missing = command_line.missing_entry_points()
    if missing:
        text = f"expected kascade in {' and '.join(missing)}, got none"
        yield Finding("entry points", text, _reinstall())
        return
    yield Finding("entry points", " and ".join(command_line.GROUPS))
    command_line.load_plugins()
    import kascade_patches

    try:
        server.require_hooks(kascade_patches.targets())
    except KascadeError as error:
        yield Finding("hooks", str(error), "unset SGLANG_PLUGINS SGLANG_PLATFORM")
    else:
        yield Finding("hooks", f"{len(kascade_patches.targets())} live on SGLang's symbols")


def _server(model: str | None, flags: Sequence[str]) -> Iterator[Finding]:
    """Read a server's arguments, which runs the checks of its start, and say what it would do."""
    import kascade_patches
    from kascade_sglang.backend.in_force import in_force
    from kascade_sglang.checks import check
    from kascade_sglang.host.command_line import read_command_line
    from kascade_sglang.host.server import server_facts

    said: list[Finding] = []
    with _warnings(said), redirect_stderr(io.StringIO()) as stderr:
        try:
            args = read_command_line(str(MODEL) if model is None else model, flags)
            facts = server_facts(args)
            config = check(facts)
        except SystemExit as stop:
            said += _refusals(stop, stderr.getvalue())
        except Exception as error:  # SGLang's own: an unknown model, a broken config.json.
            said.append(Finding("model", why_no_model(error, model or ""), _how_to_get(model)))
    unused = kascade_patches.not_run(kascade_patches.ARGUMENTS)
    if unused and not any(each.failed for each in said):
        text = f"{', '.join(unused)}: expected SGLang to call them for its arguments, got no call"
        yield Finding("hooks", text, _reinstall())
    yield from said
    if any(each.failed for each in said):
        return
    yield Finding("arguments", f"read and accepted: {' '.join(flags) or 'no flags'}")
    serves = ", ".join(f"{name} {value}" for name, value in in_force(config).items())
    yield Finding("in force", serves)
    yield _dense(config)
    yield _pages(facts)
    yield _memory(facts, config)
    yield _plan(facts) if model else _known_plans()


def _how_to_get(model: str | None) -> str:
    if model is None:
        return _reinstall()
    folder = expand(model)
    if os.path.isdir(folder):
        return f"ls {folder}/config.json"
    return f"hf download {model}" if is_hub_id(model) else f"ls {folder.parent}"


@contextmanager
def _warnings(into: list[Finding]) -> Iterator[None]:
    """Collect what Kascade warns of, which SGLang's log would show, as notes."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().removeprefix("kascade: ")
            # What the plan's own line says.
            if not text.startswith("plan: "):
                into.append(Finding("settings", text, note=True))

    handler = Collect(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("kascade_sglang", "kascade_patches")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _refusals(stop: SystemExit, stderr: str) -> list[Finding]:
    """Turn what ended the reading of arguments into failures."""
    if not isinstance(stop.code, str):  # argparse has said why on stderr.
        why = stderr.strip().splitlines()[-1] if stderr.strip() else f"exit status {stop.code}"
        return [Finding("arguments", why, HELP)]
    lines = stop.code.removeprefix("kascade: ").splitlines()
    heads = [line.partition(":")[0] for line in lines]
    # A setting or a flag; the other sentences are about the model and its plan.
    subjects = ["model" if " " in head else head for head in heads]
    return [_refusal(subject, line) for subject, line in zip(subjects, lines, strict=True)]


def _refusal(subject: str, sentence: str) -> Finding:
    """Split one of Kascade's sentences, which end in how to mend what they refuse."""
    text, _, cure = sentence.rpartition("; ")
    return Finding(subject, text or sentence, cure if text else HELP)


def _dense(config: KascadeConfig) -> Finding:
    name = config.dense_backend or default_dense_backend()
    chosen = "by --kascade-dense-backend" if config.dense_backend else "for this hardware"
    missing, text = missing_library(name), f"{name}, chosen {chosen}"
    if missing is None:
        return Finding("dense backend", text)
    cure = f"pip install --force-reinstall sglang=={version('sglang')}"
    return Finding("dense backend", f"{text}: expected the module {missing}, got none", cure)


def _pages(facts: "ServerFacts") -> Finding:
    chunk = f"chunks of {facts.chunk}" if facts.chunk else "prompts prefilled whole"
    subject, text = "pages and chunks", f"page size {facts.page_size}, {chunk}"
    cures = []
    if facts.page_size % TILE:
        cures.append(f"--page-size {TILE}")
    if facts.chunk % TILE:
        cures.append(f"--chunked-prefill-size {-(-facts.chunk // TILE) * TILE}")
    if not cures:
        return Finding(subject, f"{text}: the same keys are selected whatever is cached")
    text += f": a cached prefix or a chunk may end inside a tile of {TILE}, which changes answers "
    return Finding(subject, f"{text}a little", f"add {' '.join(cures)}", note=True)


def _memory(facts: "ServerFacts", config: KascadeConfig) -> Finding:
    from kascade_sglang.backend.memory import reserved_memory

    if not facts.gpu:
        free = psutil.virtual_memory().available
        text = f"{free / 2**30:.1f} GiB of RAM free; the torch reference reserves none"
        return Finding("memory", text, note=True)
    free, _ = torch.cuda.mem_get_info()
    reserved = reserved_memory(facts, config)
    weights = _weights(Path(facts.model.path)) // (facts.tensor_ranks * facts.stages)
    left = free - weights - reserved.scratch
    text = (
        f"{free / 2**30:.1f} GiB free, less {weights / 2**30:.1f} for weights and "
        f"{reserved.scratch // MB} MiB of scratch leaves {max(left, 0) / 2**30:.1f} for the KV "
        f"pool, in which key copies take {reserved.per_token} bytes a token"
    )
    # The command shows what else fills the GPU.
    return Finding("memory", text, "" if left > 0 else "nvidia-smi")


def _weights(folder: Path) -> int:
    """Bytes of a local model's weights; 0 where they are no folder on this machine."""
    return sum(file.stat().st_size for file in folder.expanduser().glob("*.safetensors"))


def _plan(facts: "ServerFacts") -> Finding:
    """Say where a server's plan comes from; that there is one and that it fits has been checked."""
    explicit = read_settings(facts.model.options).plan
    plan, place = locate_plan(facts.model.path, facts.model.shape, explicit)
    anchors = ",".join(map(str, plan.anchors))
    text, warning = f"{place}, anchors {anchors}", warning_of(plan)
    if warning is None:
        return Finding("plan", text)
    cure = f"kascade calibrate --model {facts.model.path} --anchors {anchors} --out plan.json"
    return Finding("plan", f"{text}: its head map is not measured", cure, note=True)


def _known_plans() -> Finding:
    shipped = ", ".join(plan.model for plan in shipped_plans().values())
    text = f"calibrated, shipped: {shipped}; anchors of the paper: {', '.join(PRESETS)}"
    return Finding("plans", f"{text}. --model M looks for M's", note=True)
