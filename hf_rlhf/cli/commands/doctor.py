"""`hf-rlhf doctor`: say what the log of a run tells is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    from hf_rlhf.metrics.names import Named

FOUND = 3
"""Exit code where something is found."""


@app.command(
    short_help="Say what is wrong with a run, and what to change.",
    epilog=examples(
        "hf-rlhf doctor outputs/quickstart                     # also of a run that still goes on, or was killed",
        "hf-rlhf doctor outputs/a outputs/b --json",
        "hf-rlhf doctor outputs/a -p no:doctor.cut_off       # without one of the patterns",
    ),
)
def doctor(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Output folders of runs, or of pipelines."),
    ],
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Look for patterns of a run that goes wrong in the logs of runs: since which step, in plain words, and the overrides
    to type. The exit code is 3 if something is found, 0 if nothing is."""
    from hf_rlhf.metrics.doctor import as_dict, diagnose

    folders = [folder for run in runs for folder in _runs_in(run)]
    with output_to_stderr(as_json):
        found = {folder: diagnose(folder, _declared(folder)) for folder in folders}
    if as_json:
        print_json({str(folder): [as_dict(finding) for finding in findings] for folder, findings in found.items()})
    else:
        from hf_rlhf.cli.runs.findings import show_findings
        from hf_rlhf.metrics.live_view import console

        out = console()
        options = [word for option in plugin or () for word in ("-p", option)]
        for folder, findings in found.items():
            print(f"{folder}: {'nothing found' if not findings else ''}".rstrip())
            show_findings(findings, [str(folder / "recipe.yaml"), *options], out)
    if any(found.values()):
        raise typer.Exit(FOUND)


def _runs_in(folder: Path) -> list[Path]:
    """Return the folder of a run, or those of a pipeline's stages. Raise `UserError` if it is neither."""
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    stages = sorted(file.parent for file in folder.glob("*/metrics.jsonl"))
    if not stages:
        raise UserError(
            f"{folder} must be the output folder of a run, got one without metrics.jsonl. Name another folder"
        )
    return stages


def _declared(folder: Path) -> list[Named] | None:
    """Return the metrics of the core and of the recipe's plugins; None, for the core's, if it cannot be made here."""
    from hf_rlhf.config.recipe import load_recipe
    from hf_rlhf.metrics.dashboard import declared

    try:
        return declared(load_recipe(str(folder / "recipe.yaml")))
    except (UserError, ValueError, OSError):
        return None
