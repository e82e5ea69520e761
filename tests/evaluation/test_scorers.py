"""Metrics against scores worked out by hand."""

import math

import pytest

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation import scorers
from kascade_sglang.evaluation.intervals import bootstrap, score_interval, wilson
from kascade_sglang.evaluation.longbench import best_score


def test_string_match() -> None:
    assert scorers.string_match_all(" Amber\x07 and AZURE", ("amber", "azure")) == 1
    assert scorers.string_match_all("amber", ("amber", "azure", "plum", "fig")) == 0.25
    assert scorers.string_match_part("it is Azure", ("amber", "azure")) == 1
    assert scorers.string_match_part("", ("amber",)) == 0


def test_qa_f1() -> None:
    assert scorers.qa_f1("The Eiffel Tower!", "eiffel tower") == 1
    # found: in paris france (3), wanted: paris (1); 1 in common: P 1/3, R 1.
    assert scorers.qa_f1("in Paris, France", "Paris") == pytest.approx(0.5)
    # Repeated words count as often as both have them: 2 in common, P 2/3, R 2/2.
    assert scorers.qa_f1("x x x", "x x") == pytest.approx(0.8)
    assert scorers.qa_f1("", "Paris") == 0


def test_rouge_l() -> None:
    # LCS "police the gunman" of 4 and 4 words: P = R = 3/4.
    both = "police killed the gunman", "police kill the gunman"
    assert scorers.rouge_l(*both) == pytest.approx(0.75, abs=1e-6)
    # LCS "the gunman" (or "police the"): 2 of 4 words each.
    both = "the gunman kill police", "police killed the gunman"
    assert scorers.rouge_l(*both) == pytest.approx(0.5, abs=1e-6)
    # Union over sentences, Lin 2004: "w1 w2 w3 w5" of 5; the reply has 8 different words.
    reply, answer = "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"
    precision, recall = 4 / 8, 4 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert scorers.rouge_l(reply, answer) == pytest.approx(expected, abs=1e-6)
    assert scorers.rouge_l("same words here", "same words here") == pytest.approx(1, abs=1e-6)
    assert scorers.rouge_l("", "x") == scorers.rouge_l("x", "") == scorers.rouge_l("...", "x") == 0


def test_rouge_l_counts_like_the_package() -> None:
    # Values of the PyPI package rouge 1.0.1: words count once, and so does an empty "sentence".
    assert scorers.rouge_l("a a a b", "a b") == pytest.approx(0.999999995)
    assert scorers.rouge_l("a b. ", "a b.") == pytest.approx(0.7999999952)
    assert scorers.rouge_l("b c a. d e", "a b c. e d f") == pytest.approx(0.5454545405)


def test_classification() -> None:
    classes = ["Other location", "location", "City", "Date"]
    assert scorers.classification("City", "City", classes) == 1
    assert scorers.classification("City or Date", "City", classes) == 0.5
    # "location" is part of the right name, so it does not count against it.
    assert scorers.classification("Other location", "Other location", classes) == 1
    assert scorers.classification("nothing", "City", classes) == 0


def test_counting_and_retrieval() -> None:
    assert scorers.number_share("There are 7, not 8", "7") == 0.5
    assert scorers.number_share("none", "7") == 0
    assert scorers.retrieval("Paragraph 12", "Paragraph 12") == 1
    assert scorers.retrieval("Paragraph 1", "Paragraph 12") == 0
    assert scorers.retrieval("段落3", "段落3") == 1


def test_code_similarity() -> None:
    assert scorers.code_similarity("\n# comment\nreturn x\nmore", "return x") == 1
    # difflib: 3 letters in common of 4 and 4: 2 * 3 / 8 = 0.75.
    assert scorers.code_similarity("abcd", "bcde") == 0.75
    # 2 * 2 / 7 = 0.5714, in whole percent.
    assert scorers.code_similarity("abx", "abyz") == 0.57
    assert scorers.code_similarity("", "x") == 0


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        (r"so \boxed{204}.", 204),
        (r"\boxed{1} then \boxed{033}", 33),
        (r"\boxed{\text{73}}", 73),
        (r"\boxed{1,000}", 1000),
        (r"\boxed{1{,}000}", 1000),
        (r"\boxed{ 25^{\circ} }", 25),
        (r"\boxed{\frac{1}{2}}", None),
        (r"\boxed{-5}", None),
        (r"\boxed{3.5}", None),
        (r"\boxed{12", None),
        ("the answer is 12", None),
    ],
)
def test_boxed_integer(reply: str, number: int | None) -> None:
    assert scorers.boxed_integer(reply) == number


def test_longbench_takes_the_best_answer_and_the_first_line() -> None:
    assert best_score("\nParis\nQ: more", "triviaqa", ("London", "Paris"), None) == 1
    assert best_score("Paris\nQ: more", "hotpotqa", ("Paris",), None) == pytest.approx(0.5)


def test_chinese_words_need_jieba() -> None:
    try:
        import jieba  # noqa: F401
    except ImportError:
        with pytest.raises(EvaluationError, match="pip install jieba"):
            scorers.qa_f1_zh("你好", "你好")
    else:
        assert scorers.qa_f1_zh("你好。", "你好") == 1


def test_wilson() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = [i / 99 for i in range(100)]
    spread = 1.96 * math.sqrt(sum((v - 0.5) ** 2 for v in values) / 100 / 100)
    assert bootstrap(values) == pytest.approx((0.5 - spread, 0.5 + spread), abs=0.01)
    assert bootstrap(values) == bootstrap(values)
    assert score_interval([1.0] * 20) == wilson(20, 20)
    assert score_interval([0.5, 1.0])[0] < 0.75
