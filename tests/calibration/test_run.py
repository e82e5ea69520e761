"""``kascade calibrate`` end to end on a tiny model folder, and its refusals."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import LlamaForCausalLM

from kascade_kernels.budget import Budget
from kascade_sglang.calibration import pools
from kascade_sglang.calibration.anchors import AnchorChoice
from kascade_sglang.calibration.answers import Selecting
from kascade_sglang.calibration.build import choices_by_mass
from kascade_sglang.calibration.collect import collect
from kascade_sglang.calibration.elimination import choose, fewest_good, run_densely
from kascade_sglang.calibration.hf_attention import kascade_generate
from kascade_sglang.calibration.hf_model import load_model
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.calibration.similarity import best_heads
from kascade_sglang.cli import main
from kascade_sglang.errors import CalibrationError
from kascade_sglang.plan.schema import load_plan
from kascade_sglang.servers.demo_model import MODEL

MASS = ("0.05", "0.1", "0.2")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of 201 tokens and one too short to measure."""
    generator = torch.Generator().manual_seed(11)
    path = tmp_path_factory.mktemp("prompts") / "dev.jsonl"
    lines = []
    for length in (200, 200, 20):
        words = torch.randint(0, 60, (length,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(f"w{word}" for word in words)}))
    path.write_text("\n".join(lines))
    return path


def tokens_of(prompts: Path) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in prompts.read_text().splitlines()]
    return [[0, *(int(word[1:]) + 4 for word in text.split())] for text in texts]


def calibrate(model: Path, prompts: Path, out: Path, *more: str) -> int:
    return main(
        ["calibrate", "--model", str(model), "--prompts", str(prompts), "--out", str(out),
         "--anchors", "2", "--min-k", "64", "--device", "cpu", *more]
    )  # fmt: skip


@pytest.mark.parametrize("criterion", ["kl", "mass"])
@pytest.mark.parametrize("heads", ["per_head", "pooled"])
def test_end_to_end(
    model_folder: Path,
    llama: LlamaForCausalLM,
    prompts: Path,
    tmp_path: Path,
    heads: str,
    criterion: str,
) -> None:
    out = tmp_path / "plan.json"
    chosen = ("--heads", heads, "--criterion", criterion)
    assert calibrate(model_folder, prompts, out, *chosen) == 0
    plan = load_plan(out)

    budget, read = Budget(0.1, 64), tokens_of(prompts)[:2]
    stats = collect(llama, read, budget)
    if criterion == "mass":
        choice, *choices = choices_by_mass(stats, heads, 2)
    else:
        how = Selecting((0, 1, 2, 3), torch.from_numpy(best_heads(stats.similarity)), budget)
        how = how._replace(pooled=heads == "pooled")
        sparse = run_densely(llama, [Prompt(ids) for ids in read], how)
        choices = choose(sparse, how.layers, 2)
        choice = choices[-1]
        assert [len(one.anchors) for one in choices] == [4, 3, 2]
    assert plan.anchors == choice.anchors and len(plan.anchors) == 2
    assert plan.budget == Budget(0.1, 64) and plan.heads == heads
    for layer, rows in plan.similarity.items():
        expected = stats.similarity[plan.anchor_of[layer], layer]
        assert torch.allclose(torch.tensor(rows), torch.tensor(expected).float(), atol=1e-5)

    provenance = plan.provenance
    assert plan.model == "tiny-llama"
    assert str(model_folder) not in out.read_text()
    assert provenance["prompts"] == 2 and provenance["tokens"] == 402
    assert provenance["prompts_file"] == "dev.jsonl" and len(provenance["prompts_sha256"]) == 64
    assert provenance["attention"] == "dense" and provenance["dtype"] == "float32"
    assert provenance["objective"] == pytest.approx(choice.objective, abs=1e-4)
    assert [len(row) for row in provenance["layer_score"]] == [3, 2, 1, 0]
    np.testing.assert_allclose([provenance["mass"][key] for key in MASS], stats.mass, atol=1e-4)
    assert provenance["criterion"] == provenance["anchors_by"] == criterion
    for tried, best in zip(provenance["choices"], choices, strict=True):
        assert tuple(tried["anchors"]) == best.anchors
        assert tried["objective"] == pytest.approx(best.objective, abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert len(kascade_generate(llama, plan, tokens_of(prompts)[0], 3)[0]) == 3


def test_same_seed_same_plan(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("a.json", "b.json"):
        assert calibrate(model_folder, prompts, tmp_path / name, "--tiles", "2") == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["provenance"]["tiles"] == 4


def test_anchors_given(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    picked, given = tmp_path / "picked.json", tmp_path / "given.json"
    assert calibrate(model_folder, prompts, picked) == 0
    assert calibrate(model_folder, prompts, given, "--anchors", "0,1,3") == 0
    plan = load_plan(given)
    assert plan.anchors == (0, 1, 3) and list(plan.similarity) == [2]
    assert plan.provenance["anchors_by"] == "the user"
    same = tmp_path / "same.json"
    anchors = load_plan(picked).anchors
    assert calibrate(model_folder, prompts, same, "--anchors", ",".join(map(str, anchors))) == 0
    assert load_plan(same).similarity == load_plan(picked).similarity
    objectives = [load_plan(path).provenance["objective"] for path in (same, picked)]
    assert objectives[0] == pytest.approx(objectives[1], abs=1e-6)


def test_anchors_that_nobody_counts(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = ["calibrate", "--model", str(model_folder), "--prompts", str(prompts), "--out"]
    assert main([*command, str(out), "--min-k", "64", "--device", "cpu"]) == 0
    plan = load_plan(out)
    choices = [
        AnchorChoice(tuple(one["anchors"]), one["objective"]) for one in plan.provenance["choices"]
    ]
    assert [len(one.anchors) for one in choices] == [4, 3]
    assert (plan.anchors, plan.provenance["objective"]) == fewest_good(choices)


def test_says_which_prompts_it_skips(
    model_folder: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert calibrate(model_folder, prompts, tmp_path / "p.json") == 0
    assert "skipped 1 of 3 prompts, too short" in caplog.text
    assert "in 2 of 2 prompts no reply of an assistant can be told" in caplog.text
    caplog.clear()
    assert calibrate(model_folder, prompts, tmp_path / "p.json", "--criterion", "mass") == 0
    assert "reply" not in caplog.text


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--anchors", "5"], "--anchors: expected 1 to 4, the model's layers, got 5"),
        (["--anchors", "0"], "--anchors: expected 1 to 4"),
        (["--anchors", "0,4"], "--anchors: expected ascending layers from 0 to at most 3, got 0,4"),
        (["--anchors", "1,2"], "--anchors: expected ascending layers from 0"),
        (["--anchors", "0,2,1"], "--anchors: expected ascending layers from 0"),
        (["--topk-ratio", "1.5"], "topk_ratio: expected a number in (0, 1]"),
        (["--topk-ratio", "1"], "every prompt is too short to measure"),
        (["--min-k", "8"], "min_k: expected"),
        (["--criterion", "loss"], "--criterion: expected one of ('kl', 'mass'), got 'loss'"),
        (["--tiles", "0"], "--tiles: expected 1 or more"),
        (["--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["--max-tokens", "4096"], "more than the model's context of 1024"),
        (["--max-tokens", "50"], "every prompt is too short to measure"),
        (["--device", "nonsense"], "--device nonsense: not usable"),
        (["--device", "meta"], "--device meta: not usable"),
        (["--dtype", "int8"], "--dtype: expected one of"),
        (["--out", "/nowhere/plan.json"], "--out /nowhere/plan.json: expected a folder"),
        (["--prompts", "/nowhere/p.txt"], "/nowhere/p.txt: cannot read the prompts"),
        (["--dataset", "x"], "expected --prompts or --dataset, got both"),
        (["--report", "page.pdf"], "--report page.pdf: expected a name that ends in .png, .svg"),
        (["--report", "/nowhere/p.png"], "--report /nowhere/p.png: expected a folder"),
        (["--device-map", "all"], "--device-map: expected one of"),
        (["--model", "/nowhere/model"], "model /nowhere/model: cannot read its configuration"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_sentence(
    model_folder: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    sentence: str,
) -> None:
    out = tmp_path / "plan.json"
    assert calibrate(model_folder, prompts, out, *more) == 1
    stderr = capsys.readouterr().err.strip().splitlines()
    assert stderr[-1].startswith("kascade: ") and sentence in stderr[-1]
    assert not any("Traceback" in line for line in stderr)
    assert not out.exists()


@pytest.mark.parametrize("written, name", [("--report", "--out"), ("--out", "--prompts")])
def test_no_output_replaces_another_file(
    model_folder: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    written: str,
    name: str,
) -> None:
    mine = tmp_path / "plan.html"
    mine.write_bytes(prompts.read_bytes())
    given = mine if name == "--prompts" else prompts
    (tmp_path / "link").symlink_to(tmp_path)
    again = str(tmp_path / "link" / "plan.html")
    assert calibrate(model_folder, given, mine, written, again) == 1
    sentence = f"{written} {again}: expected a file of its own, got that of {name}; name another"
    assert sentence in capsys.readouterr().err
    assert mine.read_bytes() == prompts.read_bytes()


def damaged(folder: Path, model_folder: Path, name: str, content: bytes | None) -> Path:
    """A copy of the model in which one file is replaced or, for None, missing."""
    copy = folder / "damaged"
    copy.mkdir()
    for file in model_folder.iterdir():
        if file.name != name:
            (copy / file.name).symlink_to(file)
    if content is not None:
        (copy / name).write_bytes(content)
    return copy


def test_tokenizer_of_a_larger_model(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    small = json.dumps({**config, "vocab_size": 32}).encode()
    model = damaged(tmp_path, model_folder, "config.json", small)
    assert calibrate(model, prompts, tmp_path / "plan.json") == 1
    assert "yields token 63, but its vocabulary has 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("config.json", None, "cannot read its configuration"),
        ("config.json", b"{", "cannot read its configuration"),
        ("config.json", b'{"model_type": "unheard-of"}', "cannot read its configuration"),
        (
            "config.json",
            b'{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}',
            "hidden size .30. is not a multiple",
        ),
        ("config.json", b"[]", "cannot read its configuration"),
        ("config.json", b"null", "cannot read its configuration"),
        ("tokenizer.json", b"{", "cannot load its tokenizer"),
        ("tokenizer.json", b"[]", "cannot load its tokenizer"),
        ("tokenizer_config.json", b"[]", "cannot load its tokenizer"),
        ("model.safetensors", None, "cannot load its weights"),
        ("model.safetensors", b"\x10" + b"\0" * 7 + b"{", "cannot load its weights"),
    ],
    ids=[
        "no-config",
        "bad-config",
        "unknown-type",
        "odd-config",
        "list-config",
        "null-config",
        "bad-tokenizer",
        "list-tokenizer",
        "list-tokenizer-config",
        "no-weights",
        "bad-weights",
    ],
)
def test_unreadable_models(
    model_folder: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    sentence: str,
) -> None:
    model = damaged(tmp_path, model_folder, name, content)
    assert calibrate(model, prompts, tmp_path / "plan.json") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"kascade: model {model}: ") and re.search(sentence, last)


def renamed(model_folder: Path) -> tuple[str, bytes]:
    tensors = load_file(model_folder / "model.safetensors")
    tensors["other"] = tensors.pop("model.layers.2.self_attn.q_proj.weight")
    return "model.safetensors", save(tensors, {"format": "pt"})


def configured(**changes: int) -> Callable[[Path], tuple[str, bytes]]:
    def change(model_folder: Path) -> tuple[str, bytes]:
        config = json.loads((model_folder / "config.json").read_text())
        return "config.json", json.dumps({**config, **changes}).encode()

    return change


@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize(
    "change, first",
    [
        (renamed, "for 1, model.layers.2.self_attn.q_proj.weight the first"),
        (configured(num_hidden_layers=5), "for 9, model.layers.4.input_layernorm.weight the"),
        (configured(intermediate_size=96), "for 12, model.layers.0.mlp.down_proj.weight the"),
    ],
    ids=["renamed", "layers", "size"],
)
def test_weights_drawn_at_random_are_not_measured(
    model_folder: Path,
    tmp_path: Path,
    change: Callable[[Path], tuple[str, bytes]],
    first: str,
    device_map: str | None,
) -> None:
    if device_map:
        pytest.importorskip("accelerate")
    model = damaged(tmp_path, model_folder, *change(model_folder))
    with pytest.raises(CalibrationError, match=f"expected weights for all .* size {first}"):
        load_model(str(model), "float32", torch.device("cpu"), device_map)


def test_tied_weights_are_not_missing() -> None:
    model = load_model(str(MODEL), "float32", torch.device("cpu"))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_makers_are_named(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Their anchors borrow by similarity to them, reuse layers by that to their anchor."""
    out = tmp_path / "plan.json"
    chosen = ("--anchors", "0,1,2", "--makers", "1", "--pool-share", "0.4", "--tiles", "2")
    assert calibrate(model_folder, prompts, out, *chosen) == 0
    plan = load_plan(out)
    assert (plan.makers, plan.pool_share, plan.maker_of) == ((1,), 0.4, {2: 1})
    assert sorted(plan.similarity) == [2, 3]


def test_makers_are_chosen(
    model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is too much to lose, all anchors but the first score the first one's pool."""
    out = tmp_path / "plan.json"
    monkeypatch.setattr(pools, "TOLERATED", 1e9)
    chosen = ("--anchors", "0,1,3", "--makers", "auto", "--tiles", "2")
    assert calibrate(model_folder, prompts, out, *chosen) == 0
    plan = load_plan(out)
    assert (plan.makers, plan.pool_share, plan.maker_of) == ((0,), 0.25, {1: 0, 3: 0})
    tried = plan.provenance["pools"]
    assert [len(one["makers"]) for one in tried][::2] == [0, 1] and len(tried) == 3


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        (("--makers", "auto", "--criterion", "mass"), "--makers auto: expected --criterion kl"),
        (("--anchors", "0,2", "--makers", "1"), "of those that --anchors names, got 1 with"),
        (("--makers", "1"), "of those that --anchors names, got 1 with --anchors 2"),
        (("--pool-share", "1.5"), "--pool-share: pool_share: expected a number between 0 and 1"),
        (("--pool-share", "0.5"), "--pool-share: expected --makers beside it, got none"),
        (("--field", "x"), "--field: expected --dataset beside it, got none"),
        (("--split", "test"), "--split: expected --dataset beside it, got none"),
    ],
)
def test_makers_that_are_no_anchors_are_refused(
    model_folder: Path,
    prompts: Path,
    tmp_path: Path,
    chosen: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert calibrate(model_folder, prompts, tmp_path / "plan.json", *chosen) == 1
    assert sentence in capsys.readouterr().err


def test_a_name_that_no_plan_can_have_is_refused_at_once(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "a\tb"
    shutil.copytree(model_folder, named)
    assert calibrate(named, prompts, tmp_path / "plan.json") == 1
    assert "printable characters" in capsys.readouterr().err
    assert not list(tmp_path.glob("plan.json*"))
