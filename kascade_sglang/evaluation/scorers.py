"""Scores of one reply, from 0 to 1, as RULER, LongBench and AIME define them.

Where a benchmark's own scorer has a quirk that moves scores, the quirk is kept and named, so that
numbers compare with published ones.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

from kascade_sglang.errors import EvaluationError

CONTROL = re.compile(r"[\x00-\x1f]")
ARTICLES = re.compile(r"\b(a|an|the)\b")
DIGITS = re.compile(r"\d+")
BOXED = "\\boxed{"
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟"
    "〰〾〿–—‘’‛“”„‟…‧﹏."
)


def string_match_all(reply: str, answers: Sequence[str]) -> float:
    """Share of the answers that the reply holds, whatever the case (RULER)."""
    reply = _printable(reply)
    return sum(answer.lower() in reply for answer in answers) / len(answers)


def string_match_part(reply: str, answers: Sequence[str]) -> float:
    """1 where the reply holds any of the answers, whatever the case (RULER's QA)."""
    reply = _printable(reply)
    return float(any(answer.lower() in reply for answer in answers))


def _printable(reply: str) -> str:
    return CONTROL.sub("\n", reply.strip()).strip().lower()


def qa_f1(reply: str, answer: str) -> float:
    """F1 of the words in common, without case, punctuation and articles (SQuAD, LongBench)."""
    return _f1(_words(reply), _words(answer))


def qa_f1_zh(reply: str, answer: str) -> float:
    """F1 of the Chinese words in common; needs the package jieba (LongBench)."""
    return _f1(_chinese_words(reply), _chinese_words(answer))


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def _chinese_words(text: str) -> list[str]:
    dropped = string.punctuation + CHINESE_PUNCTUATION
    cleaned = (
        "".join(letter for letter in word.lower() if letter not in dropped and not letter.isspace())
        for word in _segment(text)
    )
    return [word for word in cleaned if word]


def _segment(text: str) -> list[str]:
    try:
        import jieba
    except ImportError as error:
        raise EvaluationError(
            "jieba: not installed, but LongBench scores Chinese text by its words; "
            "run `pip install jieba`"
        ) from error
    return list(jieba.cut(text, cut_all=False))


def _f1(found: list[str], wanted: list[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(reply: str, answer: str) -> float:
    """F1 of summary-level ROUGE-L as the PyPI package ``rouge`` 1.0.1 counts it (LongBench).

    That package cuts sentences at full stops and counts every different word once. An empty
    reply or answer scores 0.
    """
    found, wanted = _sentences(reply), _sentences(answer)
    if not found or not wanted:
        return 0.0
    common: set[str] = set()
    for sentence in wanted:
        for other in found:
            common.update(_longest_common(sentence, other))
    precision = len(common) / len({word for sentence in found for word in sentence})
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    # The package adds 1e-8 instead of treating 0 apart.
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(reply: str, answer: str) -> float:
    """ROUGE-L of Chinese text, by its words; needs the package jieba (LongBench)."""
    return rouge_l(" ".join(_segment(reply)), " ".join(_segment(answer)))


def _sentences(text: str) -> list[list[str]]:
    """Words of every sentence; one of blanks alone holds one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _longest_common(first: list[str], second: list[str]) -> list[str]:
    """One longest common subsequence; of several, the one that skips ``second``'s end first."""
    rows = [[0] * (len(second) + 1)]
    for word in first:
        above, row = rows[-1], [0]
        for place, other in enumerate(second):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[-1]))
        rows.append(row)
    found = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def classification(reply: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the reply names, if the right one is among them."""
    named = [name for name in classes if name in reply]
    place = 0
    while place < len(named):
        # The official loop removes while it iterates, so it passes over the next name; kept.
        if named[place] in answer and named[place] != answer:
            del named[place]
        place += 1
    return 1 / len(named) if answer in named else 0.0


def number_share(reply: str, number: str) -> float:
    """Share of the reply's numbers that are the right one (LongBench's counting)."""
    numbers = DIGITS.findall(reply)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def retrieval(reply: str, answer: str) -> float:
    """``number_share`` for an answer such as ``Paragraph 7`` or ``段落7`` (LongBench)."""
    return number_share(reply, DIGITS.findall(answer)[0])


def code_similarity(reply: str, answer: str) -> float:
    """Similarity of the reply's first line of code to the right one, in whole percent.

    difflib's ratio, which is what LongBench's listed packages compute (fuzzywuzzy without
    python-Levenshtein).
    """
    lines = reply.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    line = next(code, "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def first_line(reply: str) -> str:
    """What LongBench scores of replies to few-shot tasks."""
    return reply.lstrip("\n").split("\n")[0]


def boxed_integer(reply: str) -> int | None:
    r"""The whole number in the reply's last ``\boxed{}``; None where it holds none or several."""
    start = reply.rfind(BOXED)
    if start < 0:
        return None
    begin = end = start + len(BOXED)
    depth = 1
    while end < len(reply) and depth:
        depth += {"{": 1, "}": -1}.get(reply[end], 0)
        end += 1
    if depth:
        return None
    # A thousand may be written 1,000 or 1{,}000.
    inside = reply[begin : end - 1].replace("{,}", "").replace(",", "")
    numbers = re.findall(r"-?\s*\d+", inside)
    if len(numbers) != 1 or "-" in numbers[0]:
        return None
    return int(numbers[0])


def boxed_match(reply: str, answer: int) -> float:
    r"""1 where the last ``\boxed{}`` holds the answer (AIME: a whole number from 0 to 999)."""
    return float(boxed_integer(reply) == answer)
