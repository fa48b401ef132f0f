"""Terminal output of a pipeline: each stage's held-out metrics, and where the files are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_rlhf.metrics.console import _indented, _with_interval, show_next_steps
from hf_rlhf.metrics.live_view import number

HELD_OUT = ("accuracy", "pairs/accuracy", "steps/accuracy", "tokens/accuracy", "tokens/perplexity")
LAST = {"KL to the reference": "kl/ref", "explained variance": "value/explained_var"}
"""Label -> training metric whose last value is shown."""


def show_stages(summary: dict[str, Any], out: Console, next_steps: Sequence[tuple[str, str]] = ()) -> None:
    """Print one line per stage and metric, before and after the stage, and the commands of `next_steps`."""
    out.print(Text("\nstages", style="bold"))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("stage", "recipe", "steps", "held out", "before", "after"):
        wraps = title in ("before", "after")
        table.add_column(title, justify="right" if wraps or title == "steps" else "left", no_wrap=not wraps)
    for name, stage in summary["stages"].items():
        head = (name, stage["recipe"], str(stage["steps"]))
        for cells in _lines(stage):
            table.add_row(*(Text(cell) for cell in (*head, *cells)))
            head = ("", "", "")
        if head[0]:
            table.add_row(*(Text(cell) for cell in (*head, "", "", "")))
    out.print(_indented(table))
    folder = summary["output_dir"]
    for line in (
        f"\n{summary['seconds']:.0f} s. In {folder}:",
        f"  a folder for each stage ({', '.join(summary['stages'])}), recipe.yaml, summary.json",
    ):
        out.print(Text(line), soft_wrap=True)
    show_next_steps(next_steps, out)


def _lines(stage: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield metric, value before and value after."""
    before, after, last = stage["before"] or {}, stage["after"] or {}, stage["last"]
    rewards = [name for name in after if name.startswith("reward/") and name.endswith("/mean")]
    for name in [name for name in HELD_OUT if name in after] + rewards:
        yield name, *(_with_interval(found, name) for found in (before, after))
    for label, name in LAST.items():
        if name in last:
            yield label, "", number(last[name])
