"""The table of launches: its default rows, and which row is taken where."""

import pytest
import torch

from kascade_kernels import tuning
from kascade_kernels.tuning import CUTS, DEFAULT, HOPPER, TABLE, Launch

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [*TABLE.values(), *CUTS.values()], ids=[*TABLE, *CUTS])
def test_the_last_row_and_no_other_is_the_default(rows: list) -> None:
    assert [where for where, _ in rows].index(DEFAULT) == len(rows) - 1


@pytest.mark.parametrize("kernel", TABLE)
@pytest.mark.parametrize("capability", [None, 7, 99])
def test_an_unknown_gpu_gets_the_default(
    kernel: str, capability: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where head dimension and group are unknown, too."""
    monkeypatch.setattr(tuning, "capability_of", lambda device: capability)
    default = TABLE[kernel][-1][1]
    assert tuning.launch(kernel, CPU, key_bytes=4096, group=64) == default
    of_any_gpu = [launch for where, launch in TABLE[kernel] if where.capability is None]
    assert tuning.launch(kernel, CPU, key_bytes=256, group=4) in of_any_gpu


@pytest.mark.parametrize("kind", CUTS)
def test_an_unknown_gpu_cuts_by_default(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "capability_of", lambda device: 99)
    assert tuning.cut(kind, CPU) == CUTS[kind][-1][1]


@pytest.mark.parametrize(
    ("kernel", "key_bytes", "group", "hopper", "other"),
    [
        ("tile_attention", 256, 4, (4, 2, 64), (8, 3, 64)),
        ("tile_attention", 512, 4, (8, 3, 32), (8, 2, 32)),
        ("tile_scores", 256, 8, (4, 3, 64), (8, 3, 64)),
        ("tile_scores", 256, 16, (8, 3, 128), (8, 3, 128)),
        ("tile_scores", 512, 1, (8, 2, 64), (8, 2, 64)),
        ("tile_scores.8bit", 128, 4, (4, 3, 128), (8, 3, 128)),
        ("tile_scores.8bit", 256, 4, (8, 3, 128), (8, 3, 128)),
    ],
)
def test_the_first_row_that_holds_is_taken(
    kernel: str,
    key_bytes: int,
    group: int,
    hopper: tuple[int, int, int],
    other: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for capability, expected in ((HOPPER, hopper), (8, other)):
        monkeypatch.setattr(tuning, "capability_of", lambda device, found=capability: found)
        found = tuning.launch(kernel, CPU, key_bytes, group)
        assert found[:3] == Launch(*expected)[:3]
