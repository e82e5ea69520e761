"""Where prompts come from: a file, a Hugging Face data set, or the text in the package."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kascade_sglang.calibration.chats import make_chats
from kascade_sglang.calibration.prompts import (
    PLAIN,
    TEXT_PROMPT_TOKENS,
    Prompt,
    chat_prompt,
    check_limits,
    draw,
    file_digest,
    read_prompts,
    to_prompt,
)
from kascade_sglang.errors import CalibrationError
from kascade_sglang.files import expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = "bundled chats"
"""Name of the default prompts, those of ``chats``."""

DEFAULT_LIMIT = 10
"""How many prompts are drawn of a data set, or chats made, unless ``--limit`` says."""


class PromptSet(NamedTuple):
    """Prompts, and what to call them. digest: SHA-256 of file or tokens."""

    name: str
    digest: str
    prompts: list[Prompt]


@dataclass(frozen=True)
class PromptSource:
    """What the user asks for; fields are the options' names.

    prompts: a file. dataset: a data set, whose rows hold ``text``, ``prompt`` or ``messages``,
    or the text in the column ``field``. Neither: chats that are made, of ``max_tokens`` each.
    """

    prompts: Path | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    field: str | None = None
    max_tokens: int | None = None
    limit: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """What to call the prompts in a refusal."""
        return str(self.prompts or self.dataset or BUNDLED)

    def read(self, tokenizer: "PreTrainedTokenizerBase", context: int | None) -> PromptSet:
        """Return the prompts; the same ones for the same seed.

        context: the model's context length, in tokens. Raises CalibrationError where there are
        none, or one is not a prompt or longer than the context.
        """
        if self.dataset == "":
            raise CalibrationError("--dataset: expected a name, got none; give one or drop it")
        if self.prompts is not None and self.dataset is not None:
            raise CalibrationError(
                f"--dataset: expected --prompts or --dataset, got both ({self.prompts} and "
                f"{self.dataset}); drop one"
            )
        if self.dataset is None:
            for name, usual in (("dataset_config", None), ("split", "train"), ("field", None)):
                if getattr(self, name) != usual:
                    flag = name.replace("_", "-")
                    raise CalibrationError(
                        f"--{flag}: expected --dataset beside it, got none; name one, or drop it"
                    )
        if self.prompts is not None:
            prompts = read_prompts(
                self.prompts, tokenizer, context, self.max_tokens, self.limit, self.seed
            )
            return PromptSet(self.prompts.name, file_digest(self.prompts), prompts)
        check_limits(context, self.max_tokens, self.limit)
        if self.dataset is not None:
            prompts = self._from_dataset(tokenizer, context)
            # Of a local folder only the name, so that no path enters the plan.
            folder = expand(self.dataset)
            short = folder.resolve().name if os.path.isdir(folder) else self.dataset
            name = ":".join(filter(None, (short, self.dataset_config, self.split)))
        else:
            length = self.max_tokens or min(TEXT_PROMPT_TOKENS, context or TEXT_PROMPT_TOKENS)
            chats = make_chats(
                self.limit or DEFAULT_LIMIT,
                length,
                self.seed,
                lambda text: len(tokenizer(text, add_special_tokens=False).input_ids),
            )
            prompts = [chat_prompt(chat, tokenizer, PLAIN).cut(length) for chat in chats]
            name = BUNDLED
        return PromptSet(name, digest_of(prompts), prompts)

    def _from_dataset(
        self, tokenizer: "PreTrainedTokenizerBase", context: int | None
    ) -> list[Prompt]:
        rows = self._rows()
        if self.field is not None and self.field not in rows.column_names:
            raise CalibrationError(
                f"--field {self.field}: data set {self.dataset} has the columns "
                f"{', '.join(rows.column_names)}"
            )
        prompts = []
        for index in draw(list(range(len(rows))), self.limit or DEFAULT_LIMIT, self.seed):
            record = rows[index]
            if self.field is not None:
                record = {"text": record[self.field]}
            where = f"data set {self.dataset}, row {index}"
            prompts.append(to_prompt(record, where, tokenizer, context, self.max_tokens))
        if not prompts:
            raise CalibrationError(f"data set {self.dataset}: no rows in its {self.split!r} split")
        return prompts

    def _rows(self) -> Any:
        """Load the split as rows that are read one at a time."""
        try:
            import datasets
            from datasets.exceptions import DatasetsError
        except ImportError as error:
            raise CalibrationError(
                f"--dataset {self.dataset}: needs the datasets package; pip install datasets"
            ) from error
        try:
            return datasets.load_dataset(self.dataset, self.dataset_config, split=self.split)
        except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
            text = " ".join(str(error).split())[:300]
            raise CalibrationError(
                f"--dataset {self.dataset}: cannot load its {self.split!r} split ({text})"
            ) from error


def digest_of(prompts: list[Prompt]) -> str:
    """Return the SHA-256 of prompts, in hexadecimal."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
