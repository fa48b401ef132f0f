"""`train` and `check`: turn flags and overrides into a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.flags import FLAGS, TEXT, ShowCompletions
from hf_rlhf.cli.launch import importing, start_processes
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json
from hf_rlhf.config.mappings import meaning
from hf_rlhf.metrics.live_view import LiveView
from hf_rlhf.runtime.errors import UserError

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides such as kl.0.beta=0.1 or advantages.use=leave_one_out.",
        autocompletion=completion.overrides,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe's name, package/name, or YAML file.",
        autocompletion=completion.recipe_or_override,
    ),
]
Model = Annotated[str | None, typer.Option("--model", "--model_name_or_path", help="Folder or Hub name of the model.")]
Data = Annotated[
    str | None, typer.Option("--dataset", "--dataset_name", help="File, folder or Hub name of the dataset.")
]
OutputDir = Annotated[
    str | None, typer.Option("--output-dir", "--output_dir", help="Folder of the run; outputs/RECIPE by default.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of rollouts, prompts and new weights.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", "--max_steps", help="Number of optimizer steps.")]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="The recipe, as in TRL: a YAML file or a name.",
        autocompletion=completion.recipe_names,
    ),
]


def split_words(words: Sequence[str], meant: Mapping[str, str] | None = None) -> list[str]:
    """Return overrides: `key=value` words as they are, then flags, which are those of FLAGS or fields of TrainingArguments.

    `meant`: keys of flags, in place of those in FLAGS.
    """
    overrides: list[str] = []
    flags: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            overrides.append(word)
            continue
        flag, given, value = word[2:].partition("=")
        if not given:
            value = rest.pop(0) if rest and not rest[0].startswith("--") and not is_override(rest[0]) else "true"
        flags.append(_override(flag.replace("-", "_"), value, {**FLAGS, **(meant or {})}))
    return overrides + flags


def is_override(word: str) -> bool:
    """Return whether a word is KEY=VALUE."""
    key, equals, _ = word.partition("=")
    return bool(equals) and key.replace(".", "").replace("_", "").isalnum()


def _override(flag: str, value: str, keys: Mapping[str, str]) -> str:
    if flag == "use_peft":
        return "model.lora={}" if value != "false" else "model.lora=null"
    key = keys.get(flag)
    if key is None:
        from hf_rlhf.config.training_arguments import argument_names

        fields = argument_names()
        if flag not in fields:
            known = [*FLAGS, "use_peft", "resume", "trust_remote_code", "show_completions", *fields]
            raise UserError(
                f"no option --{flag}.{meaning(flag, known)} Recipe keys are written key=value without dashes, "
                "for instance kl.0.beta=0.1"
            )
        key = f"training.{flag}"
    return f"{key}={json.dumps(value, ensure_ascii=False) if key in TEXT else value}"


def read(
    recipe: str | None,
    config: str | None,
    words: Sequence[str],
    model: str | None,
    dataset: str | None,
    seed: int | None,
    max_steps: int | None,
    loads: bool = False,
) -> Any:
    """Return the recipe with the command line's overrides, flags and options; with `loads`, what it names must be there."""
    from hf_rlhf.config.outline import check_names
    from hf_rlhf.config.recipe import load_recipe

    words = list(words)
    if config is not None and recipe is not None:  # with --config the first word is an override, if there is one
        words.insert(0, recipe)
        recipe = None
    name = config or recipe
    if name is None:
        raise UserError("a recipe is missing. For instance `hf-rlhf train quickstart`; `hf-rlhf recipes` lists them")
    overrides = split_words(words)
    if any(word.startswith("model.lora.") for word in overrides) and "model.lora={}" not in overrides:
        overrides.insert(0, "model.lora={}")
    overrides.sort(key=lambda word: word != "model.lora={}")
    for key, value in (("model.path", model), ("dataset.path", dataset)):
        overrides += [f"{key}={json.dumps(value, ensure_ascii=False)}"] if value is not None else []
    for key, number in (("training.seed", seed), ("training.max_steps", max_steps)):
        overrides += [f"{key}={number}"] if number is not None else []
    check_names(name, overrides, loads)
    return load_recipe(name, overrides)


@app.command(
    cls=completion.WithFlags,
    context_settings=EXTRA,
    short_help="Print what a recipe would do, or why it is refused.",
    epilog=examples(
        "hf-rlhf check grpo advantages.use=leave_one_out kl.0.beta=0.1",
        "hf-rlhf check grpo --num_generations 16 --learning_rate 1e-6",
        "hf-rlhf check ppo --json",
        "hf-rlhf check instructgpt ppo.recipe=grpo    # every stage of a pipeline",
    ),
)
def check(
    context: typer.Context,
    recipe: RecipeName = None,
    words: Words = None,
    model: Model = None,
    dataset: Data = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    max_steps: MaxSteps = None,
    config: Config = None,
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Print what a recipe would do, with a memory forecast, or why it is refused; load no model.

    It takes the arguments of `train`.
    """
    from hf_rlhf.config.pipeline import is_pipeline

    given = [*(words or []), *context.args]
    name = config or recipe
    if name is not None and is_pipeline(name):
        from hf_rlhf.cli.commands.pipeline import check_staged

        options = {"--model": model, "--dataset": dataset, "--max-steps": max_steps}
        flags = [flag for flag, value in options.items() if value is not None]
        check_staged(name, [*flags, *given], output_dir, seed, as_json)
        return
    with output_to_stderr(as_json):
        chosen = read(recipe, config, given, model, dataset, seed, max_steps)
        from hf_rlhf.cli.runs.run import check as make_plan
        from hf_rlhf.cli.runs.run import choose_output_dir

        plan = make_plan(chosen, str(choose_output_dir(output_dir, chosen.name, False)))
    if as_json:
        print_json({"recipe": chosen.name, **plan.as_dict()})
        return
    from hf_rlhf.metrics.console import show_plan
    from hf_rlhf.metrics.live_view import console

    show_plan(plan, console())


@app.command(
    cls=completion.WithFlags,
    context_settings=EXTRA,
    epilog=examples(
        "hf-rlhf train quickstart --max-steps 20",
        "hf-rlhf train grpo --model Qwen/Qwen3-0.6B --dataset problems.jsonl --output-dir outputs/grpo",
        "hf-rlhf train quickstart advantages.use=leave_one_out --learning_rate 1e-4",
        "hf-rlhf train mine.yaml --use_peft --report_to wandb --save_strategy steps --save_steps 50",
        "hf-rlhf train outputs/grpo/recipe.yaml --output-dir outputs/grpo --resume",
        "accelerate launch --num_processes 2 -m hf_rlhf train quickstart    # a process per device, as --nproc 2 starts them",
    ),
)
def train(
    context: typer.Context,
    recipe: RecipeName = None,
    words: Words = None,
    model: Model = None,
    dataset: Data = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    max_steps: MaxSteps = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint in the output folder.")
    ] = False,
    resume_from_checkpoint: Annotated[
        str | None, typer.Option("--resume_from_checkpoint", "--resume-from", help="Resume from this checkpoint.")
    ] = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-changed",
            metavar="NAME",
            help="Resume although this setting or content differs from the checkpoint's run, e.g. dataset. Repeatable.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", "--trust_remote_code", help="Run code that comes with the model.")
    ] = False,
    forecast: Annotated[
        bool,
        typer.Option("--plan", help="Print the whole plan, as `check` does, instead of five lines, then train."),
    ] = False,
    show_completions: ShowCompletions = None,
    config: Config = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Number of processes to train in, one per device.")
    ] = None,
    plugin: PluginOptions = None,
) -> None:
    """Train with a recipe.

    Any field of TrainingArguments is a flag as well (--learning_rate 1e-6), and TRL's names work.

    The last of these wins: defaults, environment variables (WANDB_NAME), the recipe, overrides KEY=VALUE in order, flags.
    """
    if nproc is not None and nproc > 1:
        start_processes(nproc)
    where: str | bool = resume
    if resume_from_checkpoint is not None:
        where = {"true": True, "false": False}.get(resume_from_checkpoint.lower(), resume_from_checkpoint)
    with LiveView() as view:
        with importing():
            chosen = read(recipe, config, [*(words or []), *context.args], model, dataset, seed, max_steps, loads=True)
            import hf_rlhf.training.trainer  # noqa: F401  # after the names are checked
            from hf_rlhf.cli.runs.run import train as run
        run(chosen, output_dir, where, trust_remote_code, forecast, allow_changed or (), view, show_completions)
