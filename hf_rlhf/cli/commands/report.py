"""`report`: one file about a run, or several side by side, that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import examples


@app.command(
    short_help="Write a page about a run, or several side by side.",
    epilog=examples(
        "hf-rlhf report outputs/quickstart                  # into outputs/quickstart/report.html",
        "hf-rlhf report outputs/grpo outputs/rloo           # curves in one plot, final numbers, settings that differ",
        "hf-rlhf report outputs/grpo --output grpo.html",
    ),
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="File to write; report.html in the folder of the first run by default."),
    ] = None,
    plugin: PluginOptions = None,
) -> None:
    """Write report.html: curves with healthy ranges, the doctor's findings, results before and after, completions with their
    rewards and a heat map of their tokens, plan, recipe and versions.

    It is one file below 5 MB that requests nothing. Every run writes its own at its end.
    """
    from hf_rlhf.report.build import write_report

    print(write_report(runs, output))
