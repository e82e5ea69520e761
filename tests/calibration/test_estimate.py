"""What a calibration says of its time before it starts."""

from kascade_sglang.calibration.estimate import describe


def test_a_short_calibration_is_told_in_one_number() -> None:
    assert describe(300, [1000]) == "1 prompt of up to 1000 tokens: about 5 minutes"


def test_a_long_one_offers_what_fits_in_an_hour() -> None:
    said = describe(4 * 3600, [4096] * 8)
    assert said == "8 prompts of up to 4096 tokens: about 4 hours; --limit 2 about 60 minutes"


def test_one_prompt_that_is_too_long_is_cut() -> None:
    assert describe(4 * 3600, [8192]).endswith("; --limit 1 --max-tokens 2048 is the shortest")
