"""Every generated task: the wanted length, the same prompts again, and what they hold."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.registry import groups, pick
from kascade_sglang.evaluation.ruler_qa import invented
from kascade_sglang.evaluation.samples import Order, Sample, Task
from kascade_sglang.evaluation.tokens import Tokens
from tests.support.stub import WordTokenizer

KNOWN = groups(None, None, None, None)
MADE = pick(["ruler", "facts", "perplexity"], KNOWN)


def make(name: str, tokens: Tokens, length: int = 1024, seed: int = 0) -> list[Sample]:
    (task,) = KNOWN[name]
    return task.make(Order(length, 2, seed, tokens))


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", MADE, ids=lambda task: task.name)
def test_prompts_fill_the_length(task: Task, length: int, tokens: Tokens) -> None:
    for sample in task.make(Order(length, 1, 0, tokens)):
        if sample.ids:
            total = len(sample.ids) + 1
        else:
            counted = tokens.count(sample.prompt) + tokens.count(sample.prefix)
            assert sample.tokens == counted
            total = counted + tokens.overhead + sample.max_tokens
        # Passages are long, so qa may leave most of one unused.
        spare = 260 if task.name == "qa" else max(0.06 * length, 80)
        assert length - spare <= total <= length


@pytest.mark.parametrize("task", MADE, ids=lambda task: task.name)
def test_a_seed_makes_the_same_prompts(task: Task, tokens: Tokens) -> None:
    first, again, other = (
        [sample.digest() for sample in task.make(Order(1024, 2, seed, tokens))]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert not set(first) & set(other)
    assert first[0] != first[1]


@pytest.mark.parametrize("task", pick(["ruler", "facts"], KNOWN), ids=lambda task: task.name)
def test_right_replies_score_1_and_others_0(task: Task, tokens: Tokens) -> None:
    for sample in task.make(Order(1024, 2, 0, tokens)):
        assert sample.score(f"I found {', '.join(sample.answers)}.") == 1
        assert sample.score("") == sample.score("@ # !") == 0


def test_needles_stand_in_the_prompt_once(tokens: Tokens) -> None:
    for name in ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2"):
        (sample, _) = make(name, tokens)
        (query,) = re.findall(r"number for (\S+) mentioned", sample.prompt)
        needle = f"One of the special magic numbers for {query} is: {sample.answers[0]}."
        assert sample.prompt.count(needle) == 1
        assert sample.prefix == (
            f"The special magic number for {query} mentioned in the provided text is"
        )
    (sample, _) = make("niah_multiquery", tokens)
    assert len(sample.answers) == 4 and sample.prompt.endswith(" mentioned in the provided text?")
    (sample, _) = make("niah_multivalue", tokens)
    assert len(set(sample.answers)) == 4
    (sample, _) = make("niah_multikey_3", tokens, 4096)
    assert sample.prompt.count("One of the special magic uuids") > 20


def test_variables_form_one_chain(tokens: Tokens) -> None:
    (sample, _) = make("vt", tokens)
    asked = sample.prompt.rpartition("Memorize and track")[2]
    links = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})", asked)
    value = re.findall(r"assigned the value (\d{5})", asked)[0]
    assert [name for name, _ in links] == list(sample.answers)
    assert [source for _, source in links] == [value, *sample.answers[:-1]]
    solved = sample.prompt.partition("they are: ")[2].partition("\n")[0]
    assert len(solved.split()) == 5


@pytest.mark.parametrize("length", [1024, 4096])
def test_common_words_are_the_most_common(tokens: Tokens, length: int) -> None:
    (sample, _) = make("cwe", tokens, length)
    asked = sample.prompt.rpartition("Below is a numbered list")[2].partition("\nQuestion")[0]
    counts = Counter(re.findall(r"\d+\. (\w+)", asked))
    top = counts.most_common(10)
    assert {word for word, _ in top} == set(sample.answers)
    repeats, others = (6, 1) if length < 4096 else (30, 3)
    assert {count for _, count in top} == {repeats}
    assert max(n for word, n in counts.items() if word not in sample.answers) == others


@pytest.mark.parametrize("length", [1024, 4096])
def test_frequent_words_are_the_most_frequent(tokens: Tokens, length: int) -> None:
    (sample, _) = make("fwe", tokens, length)
    coded = sample.prompt.partition("coded words. ")[2].partition("\nQuestion")[0]
    ranked = Counter(coded.split()).most_common(5)
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == list(sample.answers)
    assert ranked[3][1] > ranked[4][1], "the third and fourth word are told apart"


def test_invented_passages_answer_their_questions() -> None:
    collection = invented()
    assert len(set(collection.passages)) == len(collection.passages) > 2000
    for asked in collection.questions[::97]:
        assert asked.answers[0] in collection.passages[asked.passage]


def test_squad_passages_hold_the_answer(data: Path) -> None:
    tokens = Tokens(WordTokenizer())
    (task,) = groups(data / "squad.json", None, None, None)["qa"]
    (sample,) = task.make(Order(1024, 5, 0, tokens))
    assert sample.answers == ("Ada", "Ada Bell")
    assert sample.prompt.count("Ada sang all day.") == 1
    assert sample.prompt.endswith("Question: Who sang?")
    with pytest.raises(EvaluationError, match="passages are too few"):
        task.make(Order(32768, 1, 0, tokens))


def test_a_squad_file_of_one_passage_may_fill_a_length(tmp_path: Path) -> None:
    qas = [{"question": "Who sang?", "answers": [{"text": "Ada"}]}]
    paragraph = {"context": "Ada sang. " * 400, "qas": qas}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    (task,) = groups(path, None, None, None)["qa"]
    (sample,) = task.make(Order(1024, 1, 0, Tokens(WordTokenizer())))
    assert sample.prompt.count("Ada sang.") == 400


def test_a_length_without_room_is_refused(tokens: Tokens) -> None:
    with pytest.raises(EvaluationError, match=r"^cwe at 256 tokens: the shortest prompt has"):
        make("cwe", tokens, 256)


def test_longbench_cuts_the_middle_out(data: Path) -> None:
    tokens = Tokens(WordTokenizer())
    (task,) = pick(["longbench_qasper"], groups(None, None, data, None))
    whole, cut = (task.make(Order(None, 9, 0, tokens, limit)) for limit in (None, 300))
    assert len(whole) == 3 and not whole[0].cut and cut[0].cut
    assert cut[0].tokens <= 300 - cut[0].max_tokens
    assert cut[0].prompt.startswith("You are given a scientific article")
    assert cut[0].prompt.split()[-20:] == whole[0].prompt.split()[-20:]
    assert len(task.make(Order(None, 2, 0, tokens))) == 2
