"""The lab's findings as pictures, drawn by matplotlib (`hf_rlhf[plots]`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.lab.study import Row, Verdict
from hf_rlhf.lab.table import cosine, number, of_estimator, of_kl
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
CELL = 0.14
"""Inches of a cell of the matrix."""


def require(path: Path) -> None:
    """Check that a picture can be written to `path`. Raises `UserError` without matplotlib or for another format."""
    if path.suffix not in FORMATS:
        raise UserError(f"--picture must end in {', '.join(FORMATS)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("--picture needs matplotlib: pip install 'hf_rlhf[plots]'") from error


def save(figure: Figure, path: Path) -> None:
    """Write a picture; words in an SVG stay words."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lab"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def of_one(rows: Sequence[Row], title: str) -> Figure:
    """Draw each aggregation's expected gradient as an arrow, the goal pointing right, and its noise as a bar."""
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.cosine is not None and row.norm]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    arrows, bars = figure.subplots(1, 2)
    arrows.set_title("direction of the expected gradient", fontsize=9)
    arrows.set(xlim=(-1.1, 1.3), ylim=(-0.1, 1.1), aspect="equal")
    arrows.set_axis_off()
    arc = [math.pi * i / 60 for i in range(61)]
    arrows.plot([math.cos(x) for x in arc], [math.sin(x) for x in arc], color="0.7", linestyle=":")
    arrows.plot([0, 1], [0, 0], color="black", linewidth=2)
    arrows.text(1.03, 0, "goal", verticalalignment="center")
    for i, row in enumerate(drawn):
        angle = math.acos(max(-1.0, min(1.0, row.cosine or 0.0)))
        reach = 0.97 - 0.06 * i  # equal directions would hide each other
        tip = (reach * math.cos(angle), reach * math.sin(angle))
        arrows.plot([0, tip[0]], [0, tip[1]], color=f"C{i}", linewidth=3, marker="o", markevery=[1])
    noise = [(row.variance or 0.0) / (row.norm or 1.0) ** 2 for row in drawn]
    names = [f"{row.aggregation}, cosine {cosine(row.cosine)}\n{row.objective or ''}" for row in drawn]
    found = bars.barh(names, noise, color=[f"C{i}" for i in range(len(drawn))])
    bars.bar_label(found, [number(x) for x in noise], padding=3)
    bars.set(
        title="noise of one completion: variance / |expected gradient|\u00b2", xlim=(0, 1.2 * max(noise, default=1.0))
    )
    bars.invert_yaxis()
    bars.tick_params(labelsize=8)
    return figure


def of_matrix(rows: Sequence[Row]) -> Figure:
    """Draw a panel for each aggregation: KLs down, estimators across, the color the cosine with the goal."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    kls = list(dict.fromkeys(of_kl(row) for row in rows))
    estimators = list(dict.fromkeys(of_estimator(row) for row in rows))
    names = list(dict.fromkeys(row.aggregation for row in rows))
    colors = LinearSegmentedColormap.from_list("cosine", ["#d55e00", "white", "#0072b2"]).with_extremes(bad="#eeeeee")
    size = (3 + CELL * len(names) * (len(estimators) + 2), 3 + CELL * len(kls))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        found = [row for row in rows if row.aggregation == name]
        cells = [[math.nan] * len(estimators) for _ in kls]
        for row in found:
            cells[kls.index(of_kl(row))][estimators.index(of_estimator(row))] = (
                math.nan if row.cosine is None else row.cosine
            )
        shown = panel.imshow(cells, cmap=colors, vmin=-1, vmax=1, aspect="equal")
        panel.set_title(name, fontsize=9)
        panel.set_xticks(range(len(estimators)), [x.split("(")[0] for x in estimators], rotation=90, fontsize=7)
        panel.set_yticks(range(len(kls)), kls, fontsize=7)
        panel.tick_params(length=0)
        marks: list[tuple[list[Row], dict[str, Any]]] = [
            ([x for x in found if x.verdict is Verdict.GOAL], {"marker": "o", "color": "black"}),
            (
                [x for x in found if x.verdict is Verdict.OTHER_BETA],
                {"marker": "o", "color": "black", "facecolor": "white"},
            ),
            ([x for x in found if x.refused], {"marker": "x", "color": "#d00000", "linewidth": 0.8}),
        ]
        for chosen, style in marks:
            places = [(estimators.index(of_estimator(x)), kls.index(of_kl(x))) for x in chosen]
            panel.scatter([x for x, _ in places], [y for _, y in places], s=14, **style)
    bar = figure.colorbar(shown, ax=panels, shrink=0.4, location="bottom", aspect=40)
    bar.set_label(
        "cosine with the goal; dot: a multiple of the goal; ring: with another beta; cross: refused", fontsize=8
    )
    return figure
