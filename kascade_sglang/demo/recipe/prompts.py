"""Write the chats that the demo model's plan is calibrated on.

``python -m kascade_sglang.demo.recipe.prompts OUT.jsonl [--count 8]``

Names and values are the training split's, so that the plan is not fitted to what tests ask.
Each chat asks several questions in a row and holds their answers: the tiles in which the model
looks facts up are the ones that a plan must serve.
"""

import argparse
import json
import random
from pathlib import Path

from transformers import AutoTokenizer

from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.text.books import load_books
from kascade_sglang.text.documents import TASKS, compose, prompt

LENGTHS = (2048, 4096, 6000, 8000)


def write_prompts(out: Path, count: int = 8) -> None:
    """Write one chat a line, in the form that ``kascade calibrate --prompts`` reads."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    with open(out, "w") as file:
        for index in range(count):
            rng = random.Random(f"calibration-{index}")
            counts = dict.fromkeys(TASKS, 2)
            length = LENGTHS[index % len(LENGTHS)]
            draft = compose(rng, "train", counts, length, count_tokens, load_books())
            chat, document = [], "".join(draft.pieces)
            for turn, item in enumerate(rng.sample(draft.items, len(draft.items))):
                text = item.question.text
                chat.append({"role": "user", "content": text if turn else prompt(document, text)})
                chat.append({"role": "assistant", "content": item.reply})
            file.write(json.dumps({"messages": chat}) + "\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args()
    write_prompts(options.out, options.count)


if __name__ == "__main__":
    main()
