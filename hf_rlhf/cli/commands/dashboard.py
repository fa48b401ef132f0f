"""`dashboard`: a recipe's panels as a workspace of Weights & Biases, or as a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import examples
from hf_rlhf.runtime.errors import UserError

SPECIFICATION = ".json"


@app.command(
    short_help="Make a W&B workspace for a recipe's metrics.",
    epilog=examples(
        "hf-rlhf dashboard grpo --entity my-team --project math    # save it as a view of the project",
        "hf-rlhf dashboard ppo critic.value_clip=0.2 --output ppo.json",
        "hf-rlhf dashboard ppo.json --entity my-team --project math",
        "hf-rlhf -p my_estimator.py dashboard grpo advantages.use=mine",
    ),
)
def dashboard(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe (staged ones too): name, package/name, or YAML file; or a specification that was written before.",
            autocompletion=completion.recipe_names,
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as for train.", autocompletion=completion.overrides),
    ] = None,
    entity: Annotated[
        str | None, typer.Option("--entity", help="W&B user or team; WANDB_ENTITY, or the account's default.")
    ] = None,
    project: Annotated[str | None, typer.Option("--project", help="W&B project; WANDB_PROJECT, or hf_rlhf.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Write the specification to this file and ask no server.")
    ] = None,
    plugin: PluginOptions = None,
) -> None:
    """Make a W&B workspace: panels for what this recipe logs, with units, smoothing and lines at healthy ranges.

    Without an account, offline, or with --output the specification is written to a file, which this command takes later.
    """
    from hf_rlhf.metrics import wandb_workspace as wb

    wb.libraries()
    project = project or os.environ.get("WANDB_PROJECT", "hf_rlhf")
    made: Any = _read(name, words) if name.endswith(SPECIFICATION) else wb.workspace_of(_made(name, words))
    if output is None and not wb.has_account():
        output = f"{Path(name).stem}-dashboard{SPECIFICATION}"
        typer.echo(f"no Weights & Biases account found, or offline: writing {output} instead", err=True)
    owner = "" if output is not None else wb.owner(entity)
    made.entity, made.project = (owner, project) if output is None else (entity or "", project)
    if output is None:
        print(wb.push(made))
        return
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(wb.specification(made), encoding="utf-8")
    panels = sum(len(section.panels) for section in made.sections)
    print(f"{file}: {panels} panels in {len(made.sections)} sections")


def _made(name: str, words: list[str] | None) -> Any:
    from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
    from hf_rlhf.config.recipe import load_recipe
    from hf_rlhf.metrics.dashboard import dashboard_of, dashboard_of_stages

    if is_pipeline(name):
        return dashboard_of_stages(load_pipeline(name, words or ()))
    return dashboard_of(load_recipe(name, words or ()))


def _read(name: str, words: list[str] | None) -> Any:
    from hf_rlhf.metrics.wandb_workspace import read_specification

    if words:
        raise UserError(f"{name} is a specification, and overrides are for recipes: leave {' '.join(words)} out")
    try:
        return read_specification(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"there is no file {name}: {error.strerror}") from error
