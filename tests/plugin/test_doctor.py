"""`kascade doctor`: all is well here, and each thing that can fail is said with its cure."""

import io
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import kascade_patches
import kascade_sglang
from kascade_patches import pool_sizes
from kascade_sglang import checks, cli, doctor, provenance
from kascade_sglang.doctor import Finding, diagnose, show
from kascade_sglang.host import command_line, dense, release
from kascade_sglang.host.server import server_facts
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.servers.demo_model import MODEL
from tests.support.documents import ROOT
from tests.support.models import parse

MakeModel = Callable[..., Path]
QWEN3_8B = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "head_dim": 128,
}


def failure(findings: list[Finding]) -> Finding:
    """Return the one finding that failed."""
    (failed,) = [each for each in findings if each.failed]
    return failed


def of(findings: list[Finding], subject: str) -> Finding:
    (found,) = [each for each in findings if each.subject == subject]
    return found


def shown(findings: list[Finding]) -> tuple[int, str]:
    out = io.StringIO()
    return show(findings, Console(file=out, width=100)), out.getvalue()


def test_a_machine_that_can_serve_the_demo() -> None:
    findings = diagnose(str(MODEL), ["--page-size", "32"])
    assert not [each for each in findings if each.failed]
    assert of(findings, "kascade").text == kascade_sglang.__version__
    assert of(findings, "torch").text == torch.__version__
    hooks = of(findings, "hooks")
    assert hooks.text.startswith(f"{len(kascade_patches.targets())} live")
    assert of(findings, "plan").text.startswith(str(MODEL / PLAN_NAME))
    assert "page size 32, chunks of" in of(findings, "pages and chunks").text
    status, text = shown(findings)
    assert status == 0 and text.endswith("ready to serve\n") and "FAILED" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_is_a_note(make_model: MakeModel) -> None:
    findings = diagnose(str(make_model()))
    for subject in ("GPU", "memory"):
        assert of(findings, subject).note and not of(findings, subject).failed
    assert of(findings, "dense backend").text == "torch_native, chosen for this hardware"


def test_a_gpu_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert doctor._device() == Finding("GPU", "NVIDIA H100, sm_90, 70.0 GiB free of 80.0")


def test_a_torch_without_cuda_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "GPU_NODES", "null")
    with_cuda = doctor._device()
    assert with_cuda.note and "/dev/null is there" in with_cuda.text
    monkeypatch.setattr(torch.version, "cuda", None)
    found = doctor._device()
    assert found.failed and found.cure.startswith("pip install --force-reinstall torch==")


def test_an_unverified_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "VERIFIED", ("0.0.1",))
    findings = diagnose()
    failed = failure(findings)
    assert failed.subject == "sglang" and "expected one of 0.0.1, got 0." in failed.text
    assert failed.cure == "pip install sglang==0.0.1"
    assert findings[-1].text.startswith("not checked"), "SGLang is not imported then"
    status, text = shown(findings)
    assert status == 1 and "\nsglang:\n    pip install sglang==0.0.1\n" in text
    assert f"1 of {len(findings)} checks failed" in text


@pytest.mark.parametrize(
    ("requirement", "got"), [("torch>=99", version("torch")), ("no-such-package>=1", "none")]
)
def test_a_package_that_is_too_old_or_missing(
    requirement: str, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: [requirement])
    failed = failure(diagnose())
    assert failed.text == f"expected {requirement}, got {got}"
    assert failed.cure == f"pip install '{requirement}'"


def test_a_package_that_another_python_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["no-such-package; python_version < '3'", "no-such-package; extra == 'test'"]
    monkeypatch.setattr(doctor, "requires", lambda _: needs)
    assert not [each for each in doctor._packages() if each.failed]


def test_kascade_on_the_path_but_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    assert failure(diagnose()).cure == f"pip install -e {ROOT}"


def test_what_pip_installs_this_package_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has no checkout is told of the wheel that was installed, or of the name."""
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "kascade_sglang/doctor.py"))
    found = {"direct_url.json": '{"url": "file:///a.whl"}'}
    monkeypatch.setattr(doctor, "distribution", lambda _: SimpleNamespace(read_text=found.get))
    assert doctor._reinstall() == "pip install --force-reinstall --no-deps file:///a.whl"
    found.clear()
    assert doctor._reinstall() == "pip install --force-reinstall --no-deps kascade-sglang"


def test_triton_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**provenance.versions(), "triton": provenance.ABSENT}
    monkeypatch.setattr(doctor, "versions", lambda: found)
    failed = failure(diagnose())
    assert (failed.subject, failed.text) == ("triton", "not installed")
    assert failed.cure.startswith("pip install --force-reinstall torch==")


def test_entry_points_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    other = [SimpleNamespace(name="other")]
    monkeypatch.setattr(command_line, "entry_points", lambda group: other)
    failed = failure(list(doctor._plugin()))
    assert failed.text.startswith("expected kascade in sglang.srt.plugins and sglang.srt.platforms")
    assert "--force-reinstall" in failed.cure


def test_a_hook_that_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kascade_patches, "targets", lambda: ["nothing.there"])
    failed = failure(diagnose())
    assert failed.subject == "hooks" and "nothing.there are not live" in failed.text
    assert failed.cure == "unset SGLANG_PLUGINS SGLANG_PLATFORM"


def test_a_hook_that_sglang_does_not_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kascade_patches, "_ran", set())
    monkeypatch.setattr(kascade_patches, "ARGUMENTS", (*kascade_patches.ARGUMENTS, pool_sizes))
    failed = failure(diagnose())
    assert failed.text.startswith("pool_sizes: expected SGLang to call them for its arguments")


def test_no_plan(make_model: MakeModel) -> None:
    model = make_model(with_plan=False)
    failed = failure(diagnose(str(model)))
    assert f"no {PLAN_NAME} beside its weights, and its name is none" in failed.text
    assert f"`kascade calibrate --model {model} " in failed.cure


def test_a_plan_of_its_name_for_another_shape(make_model: MakeModel) -> None:
    folder = make_model(with_plan=False)
    failed = failure(diagnose(str(folder.rename(folder.with_name("Qwen3-8B")))))
    assert "that of Qwen3-8B is for another shape (layers is 4, the plan has 36" in failed.text


def test_a_preset_is_found_and_what_it_lacks_is_said(make_model: MakeModel) -> None:
    folder = make_model(with_plan=False, **QWEN3_8B)
    findings = diagnose(str(folder.rename(folder.with_name("Qwen3-8B"))))
    plan = of(findings, "plan")
    assert plan.note and plan.text.startswith("preset:Qwen3-8B, anchors 0,2,7,14,23")
    assert "kascade calibrate --model" in plan.cure and "--anchors 0,2,7,14,23" in plan.cure
    assert shown(findings)[0] == 0


def test_flags_that_are_refused(make_model: MakeModel) -> None:
    flags = ["--enable-lmcache", "--kascade-min-k", "3"]
    failed = [each for each in diagnose(str(make_model()), flags) if each.failed]
    assert [each.subject for each in failed] == ["--enable-lmcache", "min_k"]
    assert "drop the flag" in failed[0].cure and "at least 64" in failed[1].text


def test_a_flag_that_nobody_knows(make_model: MakeModel) -> None:
    failed = failure(diagnose(str(make_model()), ["--no-such-flag"]))
    assert "--no-such-flag" in failed.text and failed.cure == doctor.HELP


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    failed = failure(diagnose(str(tmp_path)))
    assert failed.subject == "model" and failed.cure == f"ls {tmp_path}/config.json"
    assert doctor._how_to_get("org/model") == "hf download org/model"
    assert doctor._how_to_get("/nowhere/model") == "ls /nowhere"


def test_a_dense_backend_whose_library_is_missing(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    flags = ["--kascade-dense-backend", "flashinfer"]
    failed = failure(diagnose(str(make_model()), flags))
    assert "flashinfer, chosen by --kascade-dense-backend: expected the module" in failed.text
    assert failed.cure.startswith("pip install --force-reinstall sglang==")


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--page-size", "32", "--chunked-prefill-size", "2048"], ""),
        (["--page-size", "32", "--chunked-prefill-size", "-1"], ""),
        (["--page-size", "16"], "add --page-size 32"),
        (
            ["--page-size", "1", "--chunked-prefill-size", "100"],
            "add --page-size 32 --chunked-prefill-size 128",
        ),
    ],
    ids=["multiples", "whole", "pages", "both"],
)
def test_pages_and_chunks(make_model: MakeModel, flags: list[str], cure: str) -> None:
    found = of(diagnose(str(make_model()), flags), "pages and chunks")
    assert (found.cure, found.failed) == (cure, False)


@pytest.mark.parametrize(("free", "fails"), [(2**30, False), (800 * 2**20, True)])
def test_memory_of_a_gpu(
    make_model: MakeModel, free: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    (model / "model.safetensors").write_bytes(bytes(64 * 2**20))
    facts = replace(server_facts(parse(model)), gpu=True, captured_decode=0, eager_decode=0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))
    found = doctor._memory(facts, checks.check(replace(facts, gpu=False)))
    assert found.failed is fails and "of scratch leaves" in found.text
    # int8 keys of 4 heads of 16 and their scales, in the anchors 0 and 2.
    assert f"key copies take {2 * 4 * (16 + 4)} bytes a token" in found.text
    assert "less 0.1 for weights" in found.text


def test_a_variable_that_nothing_reads(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KASCADE_MINK", "3")
    findings = diagnose(str(make_model()))
    assert any(each.note and "did you mean KASCADE_MIN_K?" in each.text for each in findings)


def test_version_names_what_decides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    line = capsys.readouterr().out.strip()
    found = provenance.versions()
    assert line == ", ".join([f"{n} {v}" for n, v in found.items()] + [provenance.device_name()])
    assert list(found) == ["kascade", "sglang", "torch", "triton"]


def test_the_command_returns_the_status(
    make_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(make_model())
    assert cli.main(["doctor", "--model", model, "--", "--page-size", "32"]) == 0
    assert "arguments" in capsys.readouterr().out
    assert cli.main(["doctor", "--model", model, "--", "--enable-lmcache"]) == 1
    assert "drop the flag" in capsys.readouterr().out
