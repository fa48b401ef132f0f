"""`serve-engine`: the servers of a recipe's rollout engine."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Annotated, Any

import typer

from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.commands.train import EXTRA, Model, RecipeName, Words, read
from hf_rlhf.cli.output import examples
from hf_rlhf.runtime.errors import UserError

HALF = {"bf16": "bfloat16", "fp16": "float16"}


@app.command(
    "serve-engine",
    context_settings=EXTRA,
    short_help="Print or run the command that starts a rollout engine's server.",
    epilog=examples(
        "hf-rlhf serve-engine grpo rollout.use=vllm --model Qwen/Qwen3-0.6B --python ../vllm/bin/python",
        "hf-rlhf serve-engine quickstart rollout.use=vllm rollout.url=http://127.0.0.1:8001 --run --enforce-eager",
    ),
)
def serve_engine(
    context: typer.Context,
    recipe: RecipeName = None,
    words: Words = None,
    model: Model = None,
    python: Annotated[
        str, typer.Option("--python", help="Python of the environment that the engine's server is installed in.")
    ] = "python",
    run: Annotated[bool, typer.Option("--run", help="Run the command instead of printing it.")] = False,
    plugin: PluginOptions = None,
) -> None:
    """Print the command that starts each server of a recipe's rollout engine, or run it.

    Further flags are the server's, and come last.
    """
    given = [*(words or []), *context.args]
    overrides = list(takewhile(lambda word: not word.startswith("-"), given))
    flags = given[len(overrides) :]
    chosen = read(recipe, None, overrides, model, None, None, None)
    algorithm, settings = chosen.algorithm(), chosen.model
    engine = algorithm.rollout
    if settings.path is None:
        raise UserError("no model: pass --model with a folder or a name on the Hub")
    dtype = next((name for flag, name in HALF.items() if chosen.training.get(flag)), settings.dtype)
    served = replace(settings, path=_served(settings.path))
    commands = engine.serve_commands(served, dtype, algorithm.longest_turn(chosen.dataset.max_prompt_tokens))
    if not commands:
        raise UserError(
            f"rollout={engine.name} has no server: it samples in the training's process. Set rollout.use=vllm"
        )
    if not run:
        for variables, arguments in commands:
            print(" ".join([*_assignments(variables), shlex.join([python, *arguments, *flags])]))
        return
    if len(commands) > 1:
        raise UserError(
            f"the recipe names {len(commands)} servers, and --run runs one. Leave --run out, and run each command"
        )
    ((variables, arguments),) = commands
    try:
        os.execvpe(python, [python, *arguments, *flags], _environment(variables))
    except OSError as error:
        raise UserError(f"--python {python} cannot be run: {error.strerror}") from error


def _served(path: str) -> str:
    """Return the folder of the quickstart's model, which is made here; other paths as they are."""
    from hf_rlhf.data.addition_task import BUILTIN, addition_model

    return str(addition_model()) if path == BUILTIN else path


def _assignments(variables: Mapping[str, str]) -> list[str]:
    """Return variables as a shell reads them before a command."""
    return [f'{name}="{x}"' if x.startswith("$") else f"{name}={shlex.quote(x)}" for name, x in variables.items()]


def _environment(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the environment with an engine's variables; its PYTHONPATH stands before the one that is there."""
    found = {**os.environ}
    for name, value in variables.items():
        found[name] = re.sub(r"^\$(\w+)$", lambda variable: os.environ.get(variable[1], ""), value)
    if "PYTHONPATH" in variables and os.environ.get("PYTHONPATH"):
        found["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    return found
