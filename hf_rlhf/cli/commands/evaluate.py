"""`evaluate`: saved models on held-out prompts, side by side."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.commands.train import EXTRA, Seed, is_override, split_words
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json
from hf_rlhf.cli.output import table as print_table
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    from hf_rlhf.training.comparison import Comparison

READ = ("model", "dataset", "rollout", "environment", "rewards", "evaluation", "training")
"""Keys of a recipe that an evaluation reads."""
MEANT = {"num_generations": "evaluation.num_generations", "temperature": "evaluation.temperature"}
"""Flags that name another setting here than for training."""
MODELS = ("--model", "--model_name_or_path")
RESULT = "evaluation.json"


def split_models(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the models among the words, and the rest: overrides and flags with their values."""
    models: list[str] = []
    others: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        flag, given, value = word.partition("=")
        if not word.startswith("--"):
            (others if is_override(word) and not Path(word).exists() else models).append(word)
        elif flag in MODELS:
            models.append(value if given else left.pop(0) if left else "")
        else:
            others.append(word)
            if not given and left and not left[0].startswith("--") and not Path(left[0]).exists():
                others += [left.pop(0)] if not is_override(left[0]) else []
    return models, others


def overrides_of(words: Sequence[str], dataset: str | None, split: str | None, seed: int | None) -> list[str]:
    """Return overrides for words, flags and options. Raises `UserError` for what an evaluation does not read."""
    own, rest = [], []
    for word in split_words(words, MEANT):
        key = word.partition("=")[0]
        if key.partition(".")[0] not in READ and "." in key:
            raise UserError(f"{key} does not change an evaluation, which reads {', '.join(READ)}. Leave it out")
        if key == "model.path" or key.startswith("model.lora"):
            raise UserError(f"{key} is not set here: name the model, or the folder of its adapter, as an argument")
        rest.append(word)
    if dataset is not None:
        own += [f"dataset.eval_path={json.dumps(dataset)}", "dataset.eval_split=train", "dataset.name=null"]
    if split is not None:
        own += [f"dataset.eval_split={json.dumps(split)}"]
    return [*own, *rest, *([f"training.seed={seed}"] if seed is not None else [])]


@app.command(
    cls=completion.WithFlags,
    context_settings=EXTRA,
    short_help="Evaluate models side by side.",
    epilog=examples(
        "hf-rlhf evaluate outputs/grpo    # as the run evaluated itself",
        "hf-rlhf evaluate Qwen/Qwen3-0.6B outputs/grpo outputs/rloo    # the first is compared with each other one",
        "hf-rlhf evaluate outputs/grpo --dataset test.jsonl --num_generations 8    # pass@8 and maj@8",
        "hf-rlhf evaluate Qwen/Qwen3-0.6B --recipe grpo --dataset test.jsonl evaluation.prompts=200",
        "hf-rlhf evaluate outputs/grpo/checkpoint-50 outputs/grpo --json --output rows    # rows as Parquet",
    ),
)
def evaluate(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|RUN... [KEY=VALUE]...",
            help="Models: folders of runs, checkpoints or models, or Hub names. Overrides such as evaluation.prompts=200.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Recipe with dataset, rewards and sampling; that of the first run by default.",
            autocompletion=completion.recipe_names,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", "--dataset_name", help="File, folder or Hub name to evaluate on; the held-out rows by default."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of the dataset to evaluate on.")] = None,
    seed: Seed = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Folder for the rows of each model (Parquet) and evaluation.json.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", "--trust_remote_code", help="Run code that comes with a model.")
    ] = False,
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Evaluate models on held-out prompts: accuracy, pass@k, maj@k, rewards and lengths, each with its 95 % interval.

    Prompts, rewards, sampling and random numbers are those of the recipe, so that a run's figures are those of its own
    evaluation. Several models are asked the same, and the differences from the first have intervals over the prompts.

    Exits with 0, with 1 if the scoring of any row failed, 2 for errors.
    """
    models, others = split_models([*(words or []), *context.args])
    if not models:
        raise UserError("evaluate needs a model: name a run's folder, or a model with --recipe NAME")
    overrides = overrides_of(others, dataset, split, seed)
    folder = None if output is None else Path(output).expanduser()
    if folder is not None and (folder / RESULT).exists():
        raise UserError(f"{folder} already contains an evaluation. Choose another --output")
    with output_to_stderr(_is_first()):
        compared = _compare(models, recipe, overrides, folder, trust_remote_code)
    if _is_first():
        _show(compared, folder, as_json)
    if compared.failed:
        raise typer.Exit(1)


def _is_first() -> bool:
    """Return whether this is the first process of those that evaluate together."""
    return int(os.environ.get("RANK", "0")) == 0


def _compare(
    models: Sequence[str], recipe: str | None, overrides: list[str], folder: Path | None, trust_remote_code: bool
) -> Comparison:
    """Evaluate the models, with the rows of each in a file of `folder`."""
    from transformers.utils import logging as transformers_logging

    from hf_rlhf.config.outline import check_names
    from hf_rlhf.training.comparison import Comparison
    from hf_rlhf.training.model_evaluation import Evaluator, find_subjects, recipe_of

    transformers_logging.disable_progress_bar()
    if recipe is not None:
        check_names(recipe, overrides)
    subjects = find_subjects(models)
    try:
        chosen = recipe_of(subjects, recipe, overrides)
        evaluator = Evaluator(recipe=chosen, trust_remote_code=trust_remote_code)
        for subject in subjects:
            evaluator.prepare(subject)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        compared = Comparison(recipe=chosen)
        for number, subject in enumerate(subjects, start=1):
            if _is_first():
                print(f"evaluating {subject.word} ({number} of {len(subjects)})", file=sys.stderr)
            compared.add(subject, evaluator.evaluate(subject, folder and folder / rows_file(subject.label)))
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return compared


def rows_file(label: str) -> str:
    """Return the name of the file with a model's rows."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}.parquet"


def _show(compared: Comparison, folder: Path | None, as_json: bool) -> None:
    """Print the figures, and write them into the folder."""
    found = compared.as_dict()
    if folder is not None:
        (folder / RESULT).write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
        for subject, _ in compared.found:
            if not (folder / rows_file(subject.label)).is_file():
                raise UserError(
                    f"the rows of {subject.word} could not be written into {folder}. Choose another --output"
                )
    if as_json:
        print_json(found)
    else:
        print(compared.title)
        print_table(*compared.table())
        if folder is not None:
            print(f"\nrows of each model and {RESULT}: {folder}")
    if compared.failed:
        print(f"{compared.failed} rows could not be scored", file=sys.stderr)
