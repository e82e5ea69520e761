"""What the soak counts."""

import random
from pathlib import Path

from benchmarks import soak
from kascade_sglang.servers.process import Server


def test_replies_that_differ_are_counted(tmp_path: Path) -> None:
    prompt = soak.Prompt(random.Random(0), 64, 16)
    prompt.alone = [[-1.0, 7, None]]
    meta = {"completion_tokens": prompt.outputs, "output_token_logprobs": [[-1.0, 7, None]]}
    load = soak.Load(Server([], tmp_path / "log"), [prompt], compare=True)
    load._check(prompt, meta)
    assert load.counts["different"] == load.counts["wrong_length"] == 0
    load._check(prompt, {**meta, "output_token_logprobs": [[-1.1, 7, None]]})
    load._check(prompt, {**meta, "output_token_logprobs": [], "num_retractions": 1})
    load._check(prompt, {**meta, "completion_tokens": 1})
    assert load.counts["different"] == 1
    assert load.counts["wrong_length"] == 1
    assert load.counts["compared"] == 3
