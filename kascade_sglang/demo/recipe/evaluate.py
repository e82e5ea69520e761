"""Ask the exported model questions through Transformers, as a user would.

Run as ``python -m kascade_sglang.demo.recipe.evaluate --lengths 2048 --documents 4``. Checks
the whole chain of tokenizer, chat template, weights and greedy decoding, on a CPU or a GPU.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.text.documents import TASKS, is_correct, make_document, messages

# Left free for the question and the marks of the chat, so that a length is a prompt's length.
ROOM = 40


class Reader:
    """The exported model, with greedy decoding."""

    def __init__(self, path: Path, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.model = model.to(device).eval()

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.tokenizer.encode(text))

    def reply(self, chat: list[dict[str, str]]) -> str:
        """The model's answer to a chat."""
        prompt = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(**prompt, max_new_tokens=48, do_sample=False)
        new = ids[0, prompt["input_ids"].shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True)


def evaluate(
    reader: Reader, length: int, documents: int, questions: int, first_seed: int, show: bool
) -> list[tuple[str, int, int, float]]:
    """Rows of (task, length, n, accuracy) over some documents of one length."""
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    for seed in range(first_seed, first_seed + documents):
        document = make_document(seed, length - ROOM, reader.count, questions)
        for question in document.questions:
            reply = reader.reply(messages(document, question))
            right[question.task].append(is_correct(question, reply))
            if show or not right[question.task][-1]:
                print(f"{question.task}: {question.text} -> {reply} [{question.answer}]")
    return [(task, length, len(found), sum(found) / len(found)) for task, found in right.items()]


def main() -> None:
    """Print a table of accuracies as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=2, help="for each task and document")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print right replies too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    reader = Reader(args.model, args.device)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["task", "length", "n", "accuracy"])
    for length in args.lengths:
        writer.writerows(
            evaluate(reader, length, args.documents, args.questions, args.first_seed, args.show)
        )


if __name__ == "__main__":
    main()
