"""What a calibration says of its time before it starts."""

import re

from kascade_sglang.calibration.collect import work_of
from kascade_sglang.calibration.estimate import describe

LAYERS = range(4)


def test_a_short_calibration_is_told_in_one_number() -> None:
    work = work_of(1000, LAYERS, 4, "error")
    assert describe(300 / work, [1000], LAYERS, 4, "error") == (
        "1 prompt of up to 1000 tokens: about 5 minutes"
    )


def test_a_long_one_offers_what_fits_in_an_hour() -> None:
    per_work = 1800 / work_of(4096, LAYERS, 4, "error")
    sentence = describe(per_work, [4096] * 8, LAYERS, 4, "error")
    assert "about 4 hours; --limit 2 about 60 minutes, --criterion mass about" in sentence
    by_mass = describe(per_work, [4096] * 8, LAYERS, 4, "mass")
    assert by_mass.split(": ")[1] == sentence.rsplit("--criterion mass ", 1)[1]


def test_one_prompt_that_is_too_long_is_cut() -> None:
    per_work = 4 * 3600 / work_of(8192, LAYERS, 4, "error")
    sentence = describe(per_work, [8192], LAYERS, 4, "error")
    assert re.search(r"--limit 1 --max-tokens 2048 about 60 minutes", sentence)
