"""Servers that speculate in chains: not refused, those included that no GPU has served yet."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from kascade_sglang import checks
from kascade_sglang.host import server, speculation
from kascade_sglang.host.release import VERIFIED_WITH_SPECULATION
from tests.plugin.test_refused_servers import CHAIN, NGRAM
from tests.support.models import SHAPE, make_plan, parse

MakeModel = Callable[..., Path]


@pytest.mark.skipif(
    version("sglang") not in VERIFIED_WITH_SPECULATION, reason="this release does not serve it"
)
@pytest.mark.parametrize(
    "algorithm, flags",
    [
        ("NGRAM", f"{NGRAM} --speculative-num-draft-tokens 4"),
        ("NGRAM", f"{NGRAM.lower()} --speculative-num-draft-tokens 4"),
        *(
            (
                name.replace("NEXTN", "EAGLE"),
                f"--speculative-algorithm {name} --speculative-draft-model-path MODEL {CHAIN} "
                "--speculative-draft-attention-backend triton",
            )
            for name in ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
        ),
    ],
)
def test_chains_of_drafts_are_served(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, algorithm: str, flags: str
) -> None:
    monkeypatch.setattr(server, "has_gpu", lambda: True)
    everything = {version("sglang"): speculation.CHAINS}
    monkeypatch.setattr(speculation, "VERIFIED_WITH_SPECULATION", everything)
    plan = make_plan(shape=replace(SHAPE, head_dim=64))
    model = make_model(plan, head_dim=64, torch_dtype="bfloat16")
    args = parse(model, *flags.replace("MODEL", str(model)).split())
    facts = server.server_facts(args)
    assert checks.check(facts)
    assert (facts.speculates_by, facts.chain) == (algorithm, 4)
    assert facts.captured_decode <= 48, "what SGLang lets run with speculation"
