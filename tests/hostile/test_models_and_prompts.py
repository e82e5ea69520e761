"""Models and prompts that nobody should trust: one sentence, no traceback, no wait, no write."""

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kascade_sglang.cli import main
from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.tokens import Tokens
from tests.hostile.conftest import Refused
from tests.hostile.files import DEEP, no_files

TEXT = {"text": "The key of the red door is 4711. " * 200}
GOOD = json.dumps(TEXT)


def calibrate(refused: Refused, model: Path, folder: Path, prompts: Path | None = None) -> str:
    if prompts is None:
        prompts = folder / "good.jsonl"
        prompts.write_text(GOOD)
    out = ("--out", folder / "plan.json", "--device", "cpu", "--criterion", "mass")
    return refused("calibrate", "--model", model, "--prompts", prompts, *out, "--anchors", "2")


def test_what_is_spoilt_is_good(small_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(GOOD)
    given = ["--model", str(small_model), "--prompts", str(prompts), "--anchors", "2"]
    given += ["--out", str(tmp_path / "plan.json"), "--device", "cpu", "--criterion", "mass"]
    assert main(["calibrate", *given]) == 0


def prompt_files() -> Iterator[tuple[str, bytes]]:
    """Yield files of prompts that are none: one bad line is enough."""
    bad = {
        "broken": '{"text": ',
        "empty-object": "{}",
        "array": "[1]",
        "number": "3",
        "null": "null",
        "deep": "[" * DEEP,
        "long-number": "9" * 5000,
        "surrogate": '{"text": "\\ud800"}',
        "text-null": '{"text": null}',
        "messages-text": '{"messages": "x"}',
        "messages-deep": '{"messages": [[[]]]}',
        "role-number": '{"messages": [{"role": 1, "content": "x"}]}',
        "content-number": '{"messages": [{"role": "user", "content": 1}]}',
        "content-missing": '{"messages": [{"role": "user"}]}',
        "part-image": '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        "speaker": '{"conversations": [{"from": "\\u001b[2J", "value": "x"}]}',
        "keys": json.dumps({"k" * 5000: 1}),
    }
    for name, line in bad.items():
        for seed in range(2):
            lines = [GOOD, GOOD]
            lines.insert(random.Random(seed).randrange(3), line)
            yield f"{name}-{seed}", "\n".join(lines).encode()
    yield "utf-16", GOOD.encode("utf-16")
    yield "zeros", bytes(100)
    yield "nothing", b""
    yield "blank", b"\n\n"
    for seed in range(4):
        draw = random.Random(seed)
        yield f"cut-{seed}", GOOD.encode()[: draw.randrange(1, len(GOOD) - 1)]
        noise = bytes(draw.randrange(0x80, 0x100) for _ in range(100))
        yield f"noise-{seed}", noise


PROMPT_FILES = dict(prompt_files())


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts(name: str, refused: Refused, small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(PROMPT_FILES[name])
    assert calibrate(refused, small_model, tmp_path, path).startswith(str(path))


def test_prompts_that_are_no_file(refused: Refused, small_model: Path, tmp_path: Path) -> None:
    for path in no_files(tmp_path, ".jsonl"):
        said = calibrate(refused, small_model, tmp_path, path)
        assert path.name[:50] in said


Spoil = Callable[[Path, Path], None]


def changed(name: str, **change: object) -> Spoil:
    def spoil(folder: Path, marker: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return spoil


def content(name: str, data: bytes) -> Spoil:
    return lambda folder, marker: (folder / name).write_bytes(data) and None


def index(name: str) -> Spoil:
    """Weights that an index says are in another file."""

    def spoil(folder: Path, marker: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        (folder / "model.safetensors").rename(outside)
        target = name.format(outside=outside)
        weights = {"model.embed_tokens.weight": target, "lm_head.weight": target}
        described = {"metadata": {}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps(described))

    return spoil


def index_of(described: object) -> Spoil:
    def spoil(folder: Path, marker: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(described))

    return spoil


def pickled(folder: Path, marker: Path) -> None:
    """Weights in torch's old form that would run code."""

    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Touch()}))


def cut(folder: Path, marker: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


HEADER = b'{"model.embed_tokens.weight":{"dtype":"F32","shape":[9,9],"data_offsets":[0,9999999]}}'
CONFIGS: dict[str, Spoil] = {
    "empty": content("config.json", b""),
    "array": content("config.json", b"[]"),
    "deep": content("config.json", b'{"a":' * DEEP),
    "utf-16": content("config.json", "{}".encode("utf-16")),
    "unknown": changed("config.json", model_type="banana\x1b[2J"),
    "type-number": changed("config.json", model_type=3),
    "no-layers": changed("config.json", num_hidden_layers=0),
    "layers-endless": changed("config.json", num_hidden_layers=5_000_000),
    "layers-text": changed("config.json", num_hidden_layers="4"),
    "no-heads": changed("config.json", num_attention_heads=0),
    "heads-negative": changed("config.json", num_key_value_heads=-2),
    "hidden-null": changed("config.json", hidden_size=None),
    "rope-text": changed("config.json", rope_parameters="yarn"),
    "layer-types": changed("config.json", layer_types=["linear_attention"] * 4),
    "architecture": changed("config.json", model_type="t5"),
}
WEIGHTS: dict[str, Spoil] = {
    "above": index("../outside.safetensors"),
    "absolute": index("{outside}"),
    "up-and-down": index("x/../../outside.safetensors"),
    "index-array": index_of([]),
    "index-empty": index_of({}),
    "index-null": index_of({"weight_map": None}),
    "index-number": index_of({"weight_map": {"lm_head.weight": 3}}),
    "pickle": pickled,
    "cut": cut,
    "empty": content("model.safetensors", b""),
    "lying-size": content("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "lying-header": content("model.safetensors", struct.pack("<Q", len(HEADER)) + HEADER),
    "no-header": content("model.safetensors", struct.pack("<Q", 8) + b"notjson!"),
    "more-layers": changed("config.json", num_hidden_layers=5),
    "more-heads": changed("config.json", num_attention_heads=8),
}
TOKENIZERS: dict[str, Spoil] = {
    "empty": content("tokenizer.json", b""),
    "array": content("tokenizer.json", b"[]"),
    "deep": content("tokenizer.json", b'{"a":' * DEEP),
    "noise": content("tokenizer.json", bytes(range(128, 256))),
    "no-model": content("tokenizer.json", b'{"version": "1.0"}'),
    "class": changed("tokenizer_config.json", tokenizer_class=3),
}


@pytest.fixture
def spoilt(small_model: Path, tmp_path: Path) -> Callable[[Spoil], Path]:
    def make(spoil: Spoil) -> Path:
        folder = tmp_path / "spoilt"
        shutil.copytree(small_model, folder)
        spoil(folder, tmp_path / "marker")
        return folder

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(
    name: str, spoilt: Callable[[Spoil], Path], refused: Refused, tmp_path: Path
) -> None:
    model = spoilt(CONFIGS[name])
    assert calibrate(refused, model, tmp_path).startswith("model")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(
    name: str, spoilt: Callable[[Spoil], Path], refused: Refused, tmp_path: Path
) -> None:
    model = spoilt(WEIGHTS[name])
    assert calibrate(refused, model, tmp_path).startswith(f"model {model}: ")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(
    name: str, spoilt: Callable[[Spoil], Path], refused: Refused, tmp_path: Path
) -> None:
    model = spoilt(TOKENIZERS[name])
    assert calibrate(refused, model, tmp_path).startswith(f"model {model}: ")
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        Tokens.load(str(model))


TEMPLATES = {
    "raises": "{{ raise_exception('a system message must come first') }}",
    "syntax": "{% for %}",
    "unknown": "{{ nothing.at.all }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__()[0]('x') }}",
    "loop": "{% for i in range(10**9) %}{% endfor %}",
    "zero": "{{ 1 / 0 }}",
    "huge": "{{ 'x' * 10**15 }}",
    "import": "{% include '/etc/passwd' %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "escape-codes": "{{ raise_exception('\x1b[2J\nkascade: ok') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(
    name: str, spoilt: Callable[[Spoil], Path], refused: Refused, tmp_path: Path
) -> None:
    template = TEMPLATES[name].encode()
    model = spoilt(content("chat_template.jinja", template))
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 9}]}))
    said = calibrate(refused, model, tmp_path, chat)
    assert said.startswith(f"{chat}:1: the chat template refuses the messages (")
    with pytest.raises(EvaluationError, match="its chat template refuses one message"):
        Tokens.load(str(model))
