"""A small model's folder, and the command line, which may neither hang, write nor fall over."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kascade_sglang.cli import main
from kascade_sglang.servers.demo_model import MODEL
from tests.hostile.files import SHAPE

SECONDS = 30
Refused = Callable[..., str]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tokenizer, and weights that load in no time."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SHAPE.hidden,
        intermediate_size=16,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.q_heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def listing(folder: Path) -> set[tuple[str, int]]:
    """Every name below a folder, with its size."""
    return {
        (os.path.join(root, name), os.lstat(os.path.join(root, name)).st_size)
        for root, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Refused:
    """Run a command that must be refused; returns its one sentence."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        before = listing(tmp_path)
        with at_most(SECONDS):
            try:
                status = main([str(each) for each in arguments])
            except SystemExit as usage:  # argparse's own refusals
                status = usage.code
        out, err = capfd.readouterr()
        assert status not in (0, None), f"accepted: {out}"
        assert out == "" and "Traceback" not in err, err
        assert listing(tmp_path) == before, "something was written"
        if status == 2:
            said = err.strip().splitlines()[-1]
            assert err.startswith("usage: kascade ") and ": error: " in said, err
            return said
        (said,) = [line for line in err.splitlines() if line.startswith("kascade: ")]
        assert err.rstrip("\n").endswith(said), err
        assert len(said) < 1000 and said.isprintable(), said
        return said.removeprefix("kascade: ")

    return run
