"""One HTML page that shows a ``Selection``: self-contained, without scripts."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kascade_sglang.calibration.selection import Selection
from kascade_sglang.errors import CalibrationError
from kascade_sglang.files import why_unwritable, write_atomically
from kascade_sglang.plan.schema import LayerRole

FAINTEST = 1e-4
"""Share of attention from which a place has a colour; the scale is logarithmic."""
PASSAGES = 12
ROLES = {
    LayerRole.DENSE: "reads all, selects",
    LayerRole.ANCHOR: "anchor",
    LayerRole.REUSE: "reuses",
    LayerRole.WINDOW: "window",
}
STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .1em .6em; text-align: left }
.maps td { padding: 0 .4em; vertical-align: middle; font-size: 12px; white-space: nowrap }
.maps img { display: block; width: 33em; image-rendering: pixelated; border-bottom: 1px solid #fff }
.passages td { border-top: 1px solid #ccc; vertical-align: top } .n { text-align: right }
.text { font: 13px/1.6 serif; white-space: pre-wrap; overflow-wrap: anywhere }
.mark { outline: 2px solid #d60 } pre { white-space: pre-wrap }
"""


def check_target(option: str, path: Path, others: Mapping[str, Path | None]) -> None:
    """Refuse a page that could not be written; others: see ``why_unwritable``."""
    why = why_unwritable(path, others)
    if why is None and path.suffix != ".html":
        why = f"expected a name that ends in .html, got {path.suffix or 'none'}; give it that"
    if why:
        raise CalibrationError(f"{option} {path}: {why}")


def write_page(
    found: Selection, decode: Callable[[Sequence[int]], str], path: Path, mark: str | None = None
) -> None:
    """Write the page of a selection.

    decode: token ids to text. mark: a text, such as the right answer; places that hold it are
    outlined. Raises CalibrationError where the file cannot be written.
    """
    texts = [decode(found.tokens_of(place)) for place in range(found.read.shape[2])]
    marked = _marked(texts, mark)
    parts = [
        _heading(found, decode(found.answer), mark),
        _maps(found, marked),
        _passages(found, texts, marked),
        _document(found, texts, marked),
    ]
    title = html.escape(f"What Kascade read of a prompt: {found.plan.model}")
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style>\n<body><h1>{title}</h1>\n" + "\n".join(parts) + "</body></html>\n"
    )
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise CalibrationError(f"{path}: cannot write the page ({error.strerror})") from error


def _marked(texts: Sequence[str], mark: str | None) -> set[int]:
    """Places that hold some of a text, which may go from one to the next."""
    if not mark:
        return set()
    starts = np.cumsum([0, *map(len, texts)])
    joined, found, at = "".join(texts), set(), -1
    while (at := joined.find(mark, at + 1)) >= 0:
        first, last = np.searchsorted(starts, [at, at + len(mark) - 1], side="right") - 1
        found.update(range(first, last + 1))
    return found


def _heading(found: Selection, answer: str, mark: str | None) -> str:
    plan, sparse = found.plan, _sparse_layers(found)
    outlined = f" Outlined: where the text says <b>{html.escape(mark)}</b>." if mark else ""
    anchors = ", ".join(map(str, plan.anchors))
    return (
        f"<p>{len(found.prompt):,} tokens of prompt; the answer: <b>{html.escape(answer)}</b></p>"
        f"<p>Anchors: layers {anchors} of {plan.shape.layers}. Means over the {found.steps} steps "
        "that decoded the answer. In a layer that is sparse, a head read "
        f"<b>{found.read[sparse].mean():.1%}</b> of the prompt's keys. Of what dense attention, by "
        "the same queries, would weigh, these and the answer's own hold "
        f"<b>{found.kept[sparse].mean():.1%}</b> (the least head "
        f"{found.kept[sparse].min():.1%}).{outlined} Computed offline by the torch reference.</p>"
    )


def _sparse_layers(found: Selection) -> list[int]:
    sparse = (LayerRole.ANCHOR, LayerRole.REUSE)
    return [n for n in range(found.plan.shape.layers) if found.plan.role(n) in sparse]


def _maps(found: Selection, marked: set[int]) -> str:
    """A row a layer; in each picture a line a KV head, from the prompt's start to its end."""
    weights = np.log(np.maximum(found.weight, FAINTEST) / FAINTEST) / -np.log(FAINTEST)
    rows = []
    for layer in range(found.plan.shape.layers):
        role = found.plan.role(layer)
        label = ROLES[role]
        if role is LayerRole.REUSE:
            label += f" {found.plan.anchor_of[layer]}"
        kept = "" if role is LayerRole.WINDOW else f"{found.kept[layer].mean():.1%}"
        images = "".join(
            f"<td>{_image(values[layer], color)}</td>"
            for values, color in ((found.read, (30, 90, 200)), (weights, (200, 60, 20)))
        )
        rows.append(f"<tr><td class=n>{layer}</td><td>{label}</td>{images}<td>{kept}</td></tr>")
    ticks = np.isin(np.arange(found.read.shape[2]), list(marked))[None].astype(float)
    if marked:
        tick = f"<td>{_image(ticks, (220, 100, 0))}</td>"
        rows.insert(0, f"<tr><td></td><td>outlined</td>{tick}{tick}<td></td></tr>")
    return (
        f"<h2>Where in the prompt</h2><p>From its start, left, to its end; {found.place} tokens a "
        f"column, a line a KV head. Left: the share of keys read. Right: dense attention's "
        f"weights, on a logarithmic scale from {FAINTEST:g} to 1.</p>"
        "<table class=maps><tr><th>layer<th><th>Kascade reads<th>dense attention weighs"
        f"<th>kept</tr>\n{chr(10).join(rows)}</table>"
    )


def _image(values: np.ndarray, color: tuple[int, int, int]) -> str:
    """Numbers [lines, columns] of 0 to 1 as an image, white to a colour."""
    from PIL import Image

    pixels = 255 - values.clip(0, 1)[..., None] * (255 - np.array(color))
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "png")
    height = max(8, 5 * len(values))
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" style="height:{height}px" src="data:image/png;base64,{data}">'


def _passages(found: Selection, texts: Sequence[str], marked: set[int]) -> str:
    """The places that dense attention weighs most, and how much of that weight was read."""
    sparse = _sparse_layers(found)
    weight, read = (of[sparse].mean(axis=(0, 1)) for of in (found.weight, found.found))
    rows = [
        f"<tr><td class=n>{weight[n]:.2%}</td><td class=n>{read[n] / weight[n]:.0%}</td>"
        f"<td class=n>{found.place * n:,}</td><td>{_span(texts[n], 0, n in marked)}</td></tr>"
        for n in np.argsort(-weight, kind="stable")[:PASSAGES]
    ]
    return (
        "<h2>What dense attention weighs most</h2><p>Means over the heads of all sparse layers."
        "</p><table class=passages><tr><th>weight<th>of it read<th>at token<th>text</tr>\n"
        f"{chr(10).join(rows)}</table>"
    )


def _document(found: Selection, texts: Sequence[str], marked: set[int]) -> str:
    """The whole prompt, darker where more was read than elsewhere."""
    read = found.read[_sparse_layers(found)].mean(axis=(0, 1))
    shade = np.sqrt(read / max(read.max(), 1e-9))
    spans = (_span(text, shade[n], n in marked) for n, text in enumerate(texts))
    return (
        "<h2>The prompt</h2><p>The darker, the more of it was read, mean over the heads of all "
        f"sparse layers; the darkest: {read.max():.0%}.</p><div class=text>{''.join(spans)}</div>"
    )


def _span(text: str, shade: float, marked: bool) -> str:
    color = f' style="background:rgba(30,90,200,{0.6 * shade:.2f})"' if shade else ""
    return f"<span{' class=mark' if marked else ''}{color}>{html.escape(text)}</span>"
