"""The lab's findings as a picture: SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from hf_rlhf.lab.study import Row, Verdict
from hf_rlhf.lab.table import cosine, number, of_estimator, of_kl

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#555555")
"""Told apart by colour-blind eyes too."""
GREY, INK = "#bbbbbb", "#222222"


def svg(width: float, height: float, parts: Iterable[str]) -> str:
    """A picture on white."""
    body = "\n".join(parts)
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    style = f'font-family="sans-serif" font-size="11" fill="{INK}"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{paper}\n{body}\n</svg>\n'


def text(x: float, y: float, words: str, more: str = "") -> str:
    """A line of text that begins at (x, y)."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    """A line."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}" '
        f'stroke-linecap="round"/>'
    )


# One combination


def of_one(rows: Sequence[Row], title: str) -> str:
    """Each aggregation's expected gradient as an arrow, the goal pointing right, and its noise as a bar."""
    drawn = [row for row in rows if row.cosine is not None and row.norm]
    return svg(760, 330, [text(20, 26, title, 'font-size="14"'), *_arrows(drawn), *_bars(drawn)])


def _arrows(rows: Sequence[Row]) -> Iterator[str]:
    """The angle is that to the goal; lengths differ only so that equal directions do not hide each other."""
    x, y, unit = 190.0, 290.0, 130.0
    arc = f"M {x - unit:g} {y:g} A {unit:g} {unit:g} 0 0 1 {x + unit:g} {y:g}"
    yield f'<path d="{arc}" fill="none" stroke="{GREY}" stroke-dasharray="3 3"/>'
    yield line(x - unit, y, x + unit, y, GREY)
    yield line(x, y, x + unit, y, INK, 2)
    yield text(x + unit + 6, y + 4, "goal")
    yield text(20, 52, "direction of the expected gradient")
    for i, row in enumerate(rows):
        angle = math.acos(max(-1.0, min(1.0, row.cosine or 0.0)))
        reach = unit * (0.97 - 0.06 * i)
        tip = (x + reach * math.cos(angle), y - reach * math.sin(angle))
        colour = COLOURS[i % len(COLOURS)]
        yield line(x, y, *tip, colour, 3)
        yield f'<circle cx="{tip[0]:.1f}" cy="{tip[1]:.1f}" r="4" fill="{colour}"/>'


def _bars(rows: Sequence[Row]) -> Iterator[str]:
    """The variance of one completion's gradient over the squared length of the expected one."""
    x, top = 400.0, 52.0
    yield text(x, top, "noise of one completion: variance / |expected gradient|\u00b2")
    noise = [(row.variance or 0.0) / (row.norm or 1.0) ** 2 for row in rows]
    for i, (row, value) in enumerate(zip(rows, noise, strict=True)):
        y, colour = top + 22 + 48 * i, COLOURS[i % len(COLOURS)]
        width = 270 * value / (max(noise) or 1.0)
        yield f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="12" fill="{colour}"/>'
        yield text(x + width + 6, y + 10, number(value))
        yield text(x, y + 25, f"{row.aggregation}, cosine {cosine(row.cosine)}")
        yield text(x, y + 37, row.objective or "", 'fill="#666666" font-size="9"')


# The whole matrix

CELL = 11


def of_matrix(rows: Sequence[Row]) -> str:
    """One panel per aggregation: KLs down, estimators across, the colour the cosine with the goal; a dot where the
    expected gradient is a multiple of the goal, a stroke where it is refused."""
    kls = list(dict.fromkeys(of_kl(row) for row in rows))
    estimators = list(dict.fromkeys(of_estimator(row) for row in rows))
    panels = list(dict.fromkeys(row.aggregation for row in rows))
    left, top, gap = 210.0, 190.0, 18.0
    wide = CELL * len(estimators)
    shapes: dict[str, list[str]] = {}
    parts = [text(8, top + CELL * i + 9, kl, 'font-size="9"') for i, kl in enumerate(kls)]
    for p, aggregation in enumerate(panels):
        x0 = left + p * (wide + gap)
        parts.append(text(x0, 20, aggregation, 'font-weight="bold"'))
        for j, estimator in enumerate(estimators):
            x = x0 + CELL * j + 9
            name = estimator.split("(")[0]
            parts.append(text(x, top - 6, name, f'font-size="9" transform="rotate(-90 {x:.1f} {top - 6:.1f})"'))
        for row in rows:
            if row.aggregation == aggregation:
                place = x0 + CELL * estimators.index(of_estimator(row)), top + CELL * kls.index(of_kl(row))
                for kind, shape in _cell(*place, row):
                    shapes.setdefault(kind, []).append(shape)
    parts += [f'<path d="{"".join(found)}" {kind}/>' for kind, found in sorted(shapes.items())]
    height = top + CELL * len(kls) + 34
    parts += _scale(left, height - 22)
    return svg(left + len(panels) * (wide + gap), height, parts)


def _cell(x: float, y: float, row: Row) -> Iterator[tuple[str, str]]:
    """(attributes of a path, its shape): cells of one colour share a path."""
    size = CELL - 1
    fill = colour_of(row.cosine) if row.cosine is not None else "#eeeeee"
    yield f'fill="{fill}"', f"M{x:g} {y:g}h{size}v{size}h-{size}z"
    dot = f"M{x + size / 2:g} {y + size / 2:g}h0"
    if row.verdict in (Verdict.GOAL, Verdict.OTHER_BETA):
        yield f'stroke="{INK}" stroke-width="5" stroke-linecap="round"', dot
    if row.verdict is Verdict.OTHER_BETA:
        yield 'stroke="white" stroke-width="2.5" stroke-linecap="round"', dot
    if row.refused:
        yield 'stroke="#d00000"', f"M{x + 1:g} {y + size - 1:g}l{size - 2}-{size - 2}"


def _scale(x: float, y: float) -> Iterator[str]:
    for i in range(21):
        yield f'<rect x="{x + 8 * i:.0f}" y="{y:.0f}" width="8" height="10" fill="{colour_of(i / 10 - 1)}"/>'
    words = "cosine with the goal, -1 to 1; dot: a multiple of the goal; ring: with another beta; stroke: refused"
    yield text(x + 176, y + 9, words, 'font-size="9"')


def colour_of(value: float) -> str:
    """White at 0, blue towards 1, orange towards -1, in steps of 0.05."""
    strength = round(20 * min(1.0, abs(value))) / 20
    end = (0, 114, 178) if value > 0 else (213, 94, 0)
    return "#" + "".join(f"{round(255 + (c - 255) * strength):02x}" for c in end)
