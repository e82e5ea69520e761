"""Train the demo model's tokenizer: byte-level BPE of 4096 entries, with a chat template.

Run as ``python -m kascade_sglang.demo.recipe.tokenizer --filler DIR/train.txt.gz``. Digits are
split in pairs and every word that facts are made of is one token, so a name is two tokens and
a four-digit value is two.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kascade_sglang.demo.recipe.encoding import PIECE
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.text import words
from kascade_sglang.text.books import load_books
from kascade_sglang.text.documents import TASKS, compose

VOCABULARY = 4096
SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Often enough that the merges for planted words come before those for rare English words.
REPEATS = 4000


def fact_words() -> list[str]:
    """Every word and number that should be one token, as it stands in a sentence."""
    lists = (
        words.ADJECTIVES,
        words.NOUNS,
        words.FIRST_NAMES,
        words.LAST_NAMES,
        words.PHRASE_FIRST,
        words.PHRASE_SECOND,
    )
    spaced = [f" {word}" for found in lists for word in found]
    pairs = [f"{number:02d}" for number in range(100)]
    return spaced + pairs + [f" {pair}" for pair in pairs]


def texts(filler: Path) -> Iterator[str]:
    """The training text: filler, documents with facts, and the words that must be tokens."""
    books = load_books(filler)
    for _, sentences in books:
        yield from (" " + sentence for sentence in sentences)
    rng = random.Random(0)
    counts = dict.fromkeys(TASKS, 8)
    for _ in range(300):
        draft = compose(rng, "train", counts, 2000, lambda text: len(text) // 4, books)
        yield "".join(draft.pieces)
        yield from (item.question.text + "\n\n" + item.reply for item in draft.items)
    for word in dict.fromkeys(fact_words()):
        yield from [word] * REPEATS


def train(filler: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer and dress it for Transformers."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(filler), trainer)
    dressed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=10240,
    )
    dressed.chat_template = CHAT_TEMPLATE
    return dressed


def main() -> None:
    """Train, check that planted words are single tokens, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filler", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=MODEL)
    arguments = parser.parse_args()
    tokenizer = train(arguments.filler)
    long = [word for word in fact_words() if len(tokenizer.encode(word)) != 1]
    print(f"{len(tokenizer)} entries; planted words of more than one token: {long}")
    tokenizer.save_pretrained(arguments.out)
    # The class name and the template in this file are what older Transformers look for.
    path = arguments.out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
