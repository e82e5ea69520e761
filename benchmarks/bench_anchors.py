"""Which anchors, on a real model: what its answers lose, by how anchors were chosen.

Anchors are chosen on chats of ``kascade calibrate`` by divergence (``kl``) and by mass, evenly
spaced and drawn at random; ``all`` are all layers. Each set is then tried on other chats, with the
head maps of the first: ``decode_kl`` over a prompt that was read densely, ``whole_kl`` where the
prompt was read sparsely, too, tile by tile. Both are KL divergences of the next token, in nats, at
the positions where the assistant speaks. No server; a GPU makes it fast.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kascade_kernels.budget import Budget
from kascade_sglang.calibration.answers import Answers, SparseAnswers, answering_rows, answers_of
from kascade_sglang.calibration.hf_attention import KascadeAttention, our_attention
from kascade_sglang.calibration.hf_model import context_length, load_model, load_tokenizer
from kascade_sglang.calibration.hf_model import pick_device
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.calibration.run import CalibrationConfig, Measured, measure, selecting
from kascade_sglang.calibration.sources import PromptSource
from kascade_sglang.files import append_csv
from kascade_sglang.plan.schema import Plan
from kascade_sglang.provenance import provenance
