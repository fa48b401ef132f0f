"""`import-trl`: a config of TRL as a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json
from hf_rlhf.config.recipe_yaml import write_yaml
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.plain_text import escaped


@app.command(
    "import-trl",
    short_help="Turn a config of TRL into a recipe.",
    epilog=examples(
        "hf-rlhf import-trl config.yaml > mine.yaml    # what has no counterpart is listed on stderr",
        "hf-rlhf import-trl config.yaml --processes 8 --output mine8.yaml    # as TRL would train on 8",
        "hf-rlhf import-trl grpo_config.json --trainer grpo --json",
    ),
)
def import_trl(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="The YAML file of `trl grpo --config`, or a config of TRL as JSON."),
    ],
    trainer: Annotated[
        Literal["grpo", "rloo", "dpo"] | None,
        typer.Option("--trainer", help="Trainer of the config, where its fields do not tell."),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Number of processes that TRL trains with: it multiplies batches.")
    ] = 1,
    output: Annotated[Path | None, typer.Option("--output", help="File for the recipe; stdout by default.")] = None,
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Turn a config of TRL's GRPO, RLOO or DPO trainer into a recipe that trains the same.

    Batches follow TRL's arithmetic, and TRL's defaults are written out. What has no counterpart is listed with the reason, on
    stderr and in the recipe's comments.
    """
    with output_to_stderr():
        from hf_rlhf.config.from_trl.converting import convert
        from hf_rlhf.config.from_trl.reading import read_config
        from hf_rlhf.config.json_schema import HEADER
        from hf_rlhf.config.recipe import OfflineRecipe, resolve

        if output is not None and output.exists():
            raise UserError(f"{output} exists. Choose another --output, or delete it")
        made = convert(read_config(config.expanduser()), trainer, processes)
        recipe = resolve(made.recipe, name=config.stem)
        if not isinstance(recipe, OfflineRecipe):
            made.notes += [("check refuses it", problem) for problem in recipe.algorithm().problems()]
    notes = [f"{name}: {reason}" for name, reason in made.notes]
    if as_json:
        print_json({"trainer": made.trainer, "recipe": made.recipe, "without_counterpart": dict(made.notes)})
        return
    head = [f"From {config.name}, a config of TRL's {made.trainer} trainer (hf-rlhf import-trl)."]
    head += ["Without an exact counterpart:", *(f"  {note}" for note in notes)] if notes else []
    text = HEADER + "".join(f"# {line}\n" for line in head) + write_yaml(made.recipe)
    for line in ["without an exact counterpart:", *(f"  {escaped(note)}" for note in notes)] if notes else []:
        print(line, file=sys.stderr)
    if output is None:
        print(text, end="")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        print(f"wrote {output}", file=sys.stderr)
