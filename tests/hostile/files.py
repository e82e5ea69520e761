"""Files that nobody should trust, made by seeds."""

import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kascade_sglang.plan.schema import MAX_BYTES, ModelShape, Plan

SHAPE = ModelShape(layers=4, q_heads=4, kv_heads=2, head_dim=8, hidden=32)
PLAN = Plan("org/model", SHAPE, (0, 2), {1: ((0.1, 0.9), (0.2, 0.3)), 3: ((1.0, 0.0), (0.0, 1.0))})
DEEP = 100_000
NOT_A_NUMBER = ("NaN", "Infinity", "-Infinity", "1e999")
FIELDS = ("model", "anchors", "anchor_of", "similarity", "topk_ratio", "min_k", "heads", "tile")
WRONG = (None, -1, [], {}, "x", "x" * 10_000, 10**400, [[]], {"a": 1}, [None], -0.5, True)
SHAPES = (
    *("(4, 3)", "(4, 1)", "(-4, 2)", "(4, -2)", "(0, 2)", "(4, 0)", "(4,)", "()", "4"),
    *("(2, 2, 2)", "(10**9, 2)", "(999999999999, 2)", "(99999999999999999999, 1)"),
    *("(4.0, 2)", "('4', 2)", "(True, 8)", "[4, 2]", "None"),
)
OF_SHAPE = ("layers", "q_heads", "kv_heads", "head_dim", "hidden")


def text_of(raw: Any) -> bytes:
    return json.dumps(raw).encode()


def with_field(name: str, value: Any) -> dict[str, Any]:
    return {**PLAN.to_json(), name: value}


def plans() -> Iterator[tuple[str, bytes]]:
    """Yield plans that are none, each with a name."""
    good = json.dumps(PLAN.to_json())
    for name in FIELDS:
        for number, value in enumerate(WRONG):
            yield f"{name}-{number}", text_of(with_field(name, value))
        yield f"{name}-missing", text_of({k: v for k, v in PLAN.to_json().items() if k != name})
    for name in OF_SHAPE:
        for number, value in enumerate((None, "4", 1.5, [4], 10**30 if name == "layers" else True)):
            model = {**PLAN.to_json()["model"], name: value}
            yield f"shape-{name}-{number}", text_of(with_field("model", model))
    for number in NOT_A_NUMBER:
        ratio, row = '"topk_ratio": 0.1', "[0.1, 0.9]"
        assert ratio in good and row in good
        yield f"ratio-{number}", good.replace(ratio, f'"topk_ratio": {number}').encode()
        yield f"similarity-{number}", good.replace(row, f"[{number}, 0.9]").encode()
    yield from _texts(good)
    yield from _random(good.encode())


def _texts(good: str) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "blank", b" \n"
    yield "zeros", bytes(1000)
    yield "deep-array", b"[" * DEEP
    yield "deep-object", b'{"a":' * DEEP
    yield (
        "deep-provenance",
        good.replace(
            '"provenance": {}', '"provenance": {"a": ' + "[" * DEEP + "]" * DEEP + "}"
        ).encode(),
    )
    yield "long-number", good.replace('"min_k": 128', '"min_k": ' + "9" * 5000).encode()
    yield "twice", good.replace('"anchors":', '"anchors": [0], "anchors":').encode()
    yield "twice-inside", good.replace('"layers":', '"layers": 9, "layers":').encode()
    yield "utf-16", good.encode("utf-16")
    yield "latin-1", good.replace("org/model", "\xe9").encode("latin-1")
    yield "escape", good.replace("org/model", "\\u001b[2J").encode()
    yield "lines", good.replace("org/model", "a\\nkascade: ok").encode()
    yield "surrogate", good.replace("org/model", "\\ud800").encode()
    yield "more", good.encode() + b"{}"
    yield "array", f"[{good}]".encode()


def _random(good: bytes) -> Iterator[tuple[str, bytes]]:
    for seed in range(20):
        draw = random.Random(seed)
        yield f"cut-{seed}", good[: draw.randrange(1, len(good) - 1)]
    for seed in range(20):
        draw = random.Random(100 + seed)
        data = bytearray(good)
        # 0xff is in no UTF-8 text.
        data[draw.randrange(len(data))] = 0xFF
        yield f"byte-{seed}", bytes(data)


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = "<H" if version == b"\x01\x00" else "<I"
    return b"\x93NUMPY" + version + struct.pack(size, len(header)) + header.encode() + data


def head_maps(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Yield head maps that are none; marker: what code in them would write."""

    def of(shape: str, data: bytes = bytes(32), kind: str = "'<i4'") -> bytes:
        return npy(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}\n", data)

    pickled = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    yield "pickle", of("(1,)", pickled, "'|O'")
    yield "bare-pickle", pickled
    code = f"__import__('os').system('touch {marker}')"
    yield "code-in-shape", of(code)
    yield "code-in-header", npy(code)
    for number, shape in enumerate(SHAPES):
        yield f"shape-{number}", of(shape)
    for number, kind in enumerate(("'<f4'", "'<i8'", "'|S4'", "[('a', '<i4')]", "3", "'<M8[s]'")):
        yield f"type-{number}", of("(4, 2)", kind=kind)
    yield "heads-out-of-range", of("(4, 2)", b"\xff" * 32)
    yield "version-3", npy("{}", version=b"\x03\x00")
    yield "version-9", npy("{}", version=b"\x09\x09")
    yield "long-header", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{"
    yield "deep-header", npy("(" * 60_000)
    yield "empty", b""
    yield "magic", b"\x93NUMPY"
    whole = of("(4, 2)", struct.pack("<8i", *([0, 1] * 4)))
    for seed in range(10):
        yield f"cut-{seed}", whole[: random.Random(seed).randrange(1, len(whole) - 1)]


def no_files(folder: Path, suffix: str) -> Iterator[Path]:
    """Yield paths that are no regular file or none that is readable."""
    yield folder / f"missing{suffix}"
    yield folder / f"{'x' * 300}{suffix}"
    (folder / f"folder{suffix}").mkdir()
    yield folder / f"folder{suffix}"
    (folder / f"loop{suffix}").symlink_to(folder / f"loop{suffix}")
    yield folder / f"loop{suffix}"
    os.mkfifo(folder / f"pipe{suffix}")
    yield folder / f"pipe{suffix}"
    (folder / f"endless{suffix}").symlink_to("/dev/zero")
    yield folder / f"endless{suffix}"
    with open(folder / f"huge{suffix}", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    yield folder / f"huge{suffix}"
    yield folder / f"huge{suffix}" / f"below{suffix}"
