"""`hf-rlhf schema`: write the JSON schema of recipes, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import examples, output_to_stderr
from hf_rlhf.config.json_schema import FILE, HEADER, recipe_schema
from hf_rlhf.runtime.errors import UserError


@app.command(
    short_help="Write the JSON schema of recipes, for editors.",
    epilog=examples(
        f"hf-rlhf schema --output {FILE}              # beside your recipes",
        f"hf-rlhf -p my_reward.py schema --output {FILE}",
    ),
)
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write; the schema is printed by default.")
    ] = None,
    plugin: PluginOptions = None,
) -> None:
    """Write the JSON schema of recipes with every installed plugin: an editor then completes keys, shows their docs and
    marks what is wrong. A recipe names its schema in the first line, which `hf-rlhf recipes show` writes."""
    with output_to_stderr():
        text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}. Pass another --output") from error
    print(
        f"{output}: a recipe in the same folder names it in its first line:\n{HEADER.replace(FILE, output.name)}",
        end="",
    )
