"""What ``make bench-quality`` computes from replies, and the chats that it calibrates from."""

import json
import math
import random
from pathlib import Path

import pytest

from benchmarks.bench_quality import CONFIGS, Model, by_prompt, paired, phases, split
from benchmarks.chats import make_chat
from benchmarks.plot_quality import summary
from benchmarks.tables import QUALITY, RESULTS, newest
from kascade_sglang.evaluation.endpoint import Reply
from kascade_sglang.evaluation.results import SavedReply


def test_differences_are_paired_by_prompt() -> None:
    cells = paired([1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], perplexity=False)
    assert (cells["score"], cells["dense_score"], cells["diff"]) == ("50.00", "75.00", "-25.00")
    assert float(cells["diff_low"]) < -25 < float(cells["diff_high"]) <= 0
    same = paired([0.5, 1.0], [0.5, 1.0], perplexity=False)
    assert [same[name] for name in ("diff", "diff_low", "diff_high")] == ["0.00"] * 3


def test_perplexity_is_worse_where_it_is_higher() -> None:
    cells = paired([math.log(11.0)], [math.log(10.0)], perplexity=True)
    assert (cells["score"], cells["dense_score"], cells["diff"]) == ("11.000", "10.000", "-10.00")


def test_replies_meet_by_task_length_prompts_and_number() -> None:
    reply = SavedReply(1.0, Reply("x", 10, 1, 0.1))
    found = by_prompt({"dense|m|vt|4096|chat|0.0|abc|3": reply})
    assert found == {("vt", "4096", "abc"): {"3": reply}}


def test_configurations_serve_what_they_say(tmp_path: Path) -> None:
    model = Model("Qwen/Qwen2.5-Coder-0.5B-Instruct", tmp_path / "p.json", "triton", 4096)
    assert "kascade" not in model.arguments("dense", [])
    environment, flags = split("KASCADE_SELECTION=quest " + CONFIGS["decode"])
    assert environment == {"KASCADE_SELECTION": "quest"}
    assert model.arguments("quest", flags)[-2:] == ["--kascade-phases", "decode"]
    with pytest.raises(SystemExit, match="got 'quest'"):
        split("quest --kascade-phases decode")
    assert phases("dense", "") == "none" and phases("default", "") == "both"
    assert phases("fp8", "--attention-backend fa3 --kv-cache-dtype fp8_e4m3") == "none"
    assert phases("decode", CONFIGS["decode"]) == "decode"


def test_chats_ask_for_what_their_documents_hold() -> None:
    messages = make_chat(random.Random(0), 6000, lambda text: len(text) // 4)
    documents = messages[0]["content"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(answers) >= 4 and 4000 < len(json.dumps(messages)) // 4 < 9000
    assert sum(answer.splitlines()[0] in documents for answer in answers) >= len(answers) - 1


def test_the_table_leaves_out_what_was_not_asked_whole() -> None:
    rows = newest(RESULTS / "quality_models.csv", QUALITY)
    table = summary(rows).set_index("config")
    assert (
        table.loc["prefill_min_k_8192"].isna().any()
        and not table.loc["prefill_min_k_4096"].isna().any()
    )
    mine = rows[(rows["config"] == "prefill_min_k_4096") & (rows["length"] == 8192)]
    mean = mine[mine["task"] != "perplexity"]["diff"].mean()
    assert table.loc["prefill_min_k_4096", 8192] == pytest.approx(mean)
