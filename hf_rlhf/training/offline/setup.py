"""Recipes without rollouts: checks and plan before anything is loaded, then rows, model and trainer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hf_rlhf.config.optimizer_arguments import optimizer_problems
from hf_rlhf.config.plan import Plan
from hf_rlhf.config.plan_in_words import data_in_words, offline_batch_in_words, offline_model_in_words
from hf_rlhf.config.recipe import OfflineRecipe
from hf_rlhf.config.sharding import model_sharding_problems, process_problems, sharding_of
from hf_rlhf.config.training_arguments import DECISIVE, check_arguments
from hf_rlhf.contract.offline_trainer import Materials, OfflineTrainer
from hf_rlhf.data.model_loading import load_tokenizer
from hf_rlhf.data.offline_rows import encode, longest, read_rows
from hf_rlhf.data.quantization import model_problems
from hf_rlhf.metrics.live_view import OFFLINE_SHOWN
from hf_rlhf.metrics.notebook import notebook_view, show_in_notebook
from hf_rlhf.modeling.policy import embedded_padding
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.versions import versions
from hf_rlhf.training.hub_trainer import ask_for_repository
from hf_rlhf.training.model_checks import (
    check_causal,
    check_trained,
    check_vocabulary,
    dtype_problems,
    dtype_remarks,
    known_model,
)
from hf_rlhf.training.offline.model import context_of, load_with_head
from hf_rlhf.training.offline.trainer_mixin import OfflineRun, complete, factory

if TYPE_CHECKING:
    from transformers import TrainingArguments

DATA_ORDER = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy")
"""Arguments that a resumed run must share with its checkpoint, besides `DECISIVE`."""


def check_recipe(recipe: OfflineRecipe, args: TrainingArguments) -> Plan:
    """Return the plan of a recipe without loading a model. Raises `ValueError` with every reason for refusal."""
    plan = _checked(recipe, args)
    rows = held_out = None
    if recipe.rows.path is not None:
        train, evaluation = read_rows(recipe.rows, recipe.trainer())
        rows, held_out = len(train), None if evaluation is None else len(evaluation)
        plan.skipped += [] if evaluation is not None else [NOT_HELD_OUT]
    plan.arithmetic = _arithmetic(args, recipe.trainer(), rows, held_out)
    _put_in_words(plan, recipe, args, rows, 0 if rows is not None and held_out is None else held_out)
    return plan


def _put_in_words(
    plan: Plan,
    recipe: OfflineRecipe,
    args: TrainingArguments,
    rows: int | None,
    held_out: int | None,
    longest: int | None = None,
) -> None:
    trainer = recipe.trainer()
    packed = trainer.footprint(False).packed
    plan.in_words = {
        "model": offline_model_in_words(trainer, recipe.model),
        "data": data_in_words(recipe.rows.path, "rows", rows, held_out, longest),
        "algorithm": trainer.in_words(),
        "batch": offline_batch_in_words(args, packed, None if packed else rows),
    }


NOT_HELD_OUT = "evaluation: no rows are held out (dataset.held_out, dataset.eval_split, dataset.eval_path)"


def _checked(recipe: OfflineRecipe, args: TrainingArguments, refused: Iterable[str] = ()) -> Plan:
    check_arguments(args, rollouts=False)
    trainer = recipe.trainer()
    lora = recipe.model.lora is not None
    config, dtype = known_model(recipe.model)
    problems = [*model_problems(recipe.model, lora, [("trainer", trainer)]), *dtype_problems(dtype, lora)]
    problems += [*trainer.problems(recipe.model), *optimizer_problems(args)]
    problems += [*model_sharding_problems(args, recipe.model), *refused]
    if problems:
        raise ValueError("\n".join(problems))
    plan = Plan(plugins=get_host().manifest([type(trainer)]))
    plan.models.append(_model_line(recipe))
    plan.remarks += [*dtype_remarks(dtype, lora, args, config), *recipe.notes]
    return plan


@doing("loading the model")
def make_trainer(
    recipe: OfflineRecipe,
    output_dir: str | None = None,
    callbacks: Sequence[Any] = (),
    trust_remote_code: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
) -> OfflineRun:
    """Check the recipe, encode its rows, load its model, and return the trainer that its plugin builds.

    Rows are encoded, and refused, before the model is loaded; `on_plan` gets the plan in between, with a memory
    forecast. Raises `ValueError` or `UserError`.
    """
    started, view = time.perf_counter(), notebook_view(OFFLINE_SHOWN)
    args = recipe.training_arguments(output_dir)
    plan, plugin = _checked(recipe, args, process_problems(args)), recipe.trainer()
    with doing("reading the dataset"):
        train_rows, held_out = read_rows(recipe.rows, plugin)
        plan.skipped += [] if held_out is not None else [NOT_HELD_OUT]
        tokenizer = load_tokenizer(recipe.model, trust_remote_code)
        context = context_of(recipe.model, trust_remote_code)
        train = encode(train_rows, plugin, tokenizer, context, "dataset")
        evaluation = None
        if held_out is not None:
            evaluation = encode(held_out, plugin, tokenizer, context, "evaluation dataset")
    arguments = complete(recipe.training_keywords(output_dir))
    if sharding_of(args) is not None:
        arguments |= {"fsdp": None, "fsdp_config": None, "gradient_checkpointing": args.gradient_checkpointing}
    most = max(longest(part) for part in (train, evaluation) if part is not None)
    _put_in_words(plan, recipe, args, len(train), 0 if evaluation is None else len(evaluation), most)
    if on_plan is not None:
        with suppress(Exception):  # a run does not depend on its forecast
            estimate_memory(plan, recipe, args, tokens=most, trust_remote_code=trust_remote_code)
        on_plan(plan)
    ask_for_repository(args)
    model = load_with_head(recipe.model, plugin, tokenizer, arguments["seed"], trust_remote_code)
    check_trained(model)
    check_vocabulary(tokenizer, model)
    rows = {"train": len(train), "evaluation": 0 if evaluation is None else len(evaluation)}
    record = _record(recipe, arguments, rows)
    shared: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "train": train, "evaluation": evaluation}
    made = factory(plugin, record, recipe.model, **shared, callbacks=list(callbacks), sharding=sharding_of(args))
    try:
        with embedded_padding(tokenizer, model):
            trainer = plugin.build(Materials(**shared, arguments=arguments, trainer=made))
    except ValueError as error:
        raise ValueError(f"trainer={plugin.name}: {error}") from error
    if not isinstance(trainer, OfflineRun):
        raise ValueError(
            f"trainer={plugin.name}: build must return what materials.trainer(cls, args) makes, got a "
            f"{type(trainer).__name__}: its checkpoints and its evaluation would not be the run's"
        )
    if plugin.head == "causal":
        check_causal(trainer.model)
    packed: Any = trainer.train_dataset
    plan.arithmetic = _arithmetic(trainer.args, plugin, len(train), rows["evaluation"], len(packed))
    record["plan"] = json.loads(json.dumps(plan.as_dict()))
    trainer.plan, trainer.started = plan, started
    trainer.longest = most
    show_in_notebook(trainer, view)
    return trainer


def _record(recipe: OfflineRecipe, arguments: dict[str, Any], rows: dict[str, int]) -> dict[str, Any]:
    run = {
        "training": {name: arguments[name] for name in (*DECISIVE, *DATA_ORDER)},
        "model": {name: x for name, x in asdict(recipe.model).items() if name != "save_merged"},
        "dataset": asdict(recipe.rows),
        "rows": rows,
    }
    record: dict[str, Any] = {
        "algorithm": {"trainer": recipe.raw["trainer"]},
        "run": run,
        "name": recipe.name,
        "recipe": recipe.raw,
        "rows": rows,
        "versions": versions(),
    }
    return json.loads(json.dumps(record, default=str))  # as a checkpoint's manifest returns it


def estimate_memory(
    plan: Plan,
    recipe: OfflineRecipe,
    args: TrainingArguments,
    *,
    tokens: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Fill in the plan's memory forecast. `tokens`: length of the longest row, where it is known."""
    from hf_rlhf.training.offline.memory_estimate import estimate_offline

    found = estimate_offline(recipe.model, recipe.trainer(), args, tokens=tokens, trust_remote_code=trust_remote_code)
    plan.memory, plan.memory_notes = found.phases, found.notes


def _arithmetic(
    args: TrainingArguments,
    trainer: OfflineTrainer,
    rows: int | None,
    held_out: int | None,
    sequences: int | None = None,
) -> list[tuple[str, str, str]]:
    """Return the plan's arithmetic. `sequences`: how many the rows are packed into, where that is known."""
    packed = trainer.footprint(False).packed
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    of_epoch, most = (rows, "at most ") if packed and sequences is None else (sequences or rows, "")
    if args.max_steps > 0:
        steps = str(args.max_steps)
    else:
        steps = (
            "?" if of_epoch is None else f"{most}{math.ceil(math.ceil(of_epoch / per_step) * args.num_train_epochs)}"
        )
    unit = "sequences" if packed else "rows"
    into = [("sequences of packed rows", "?" if of_epoch is None else f"{most}{of_epoch}", "trainer.packing")]
    return [
        ("rows to train on", "?" if rows is None else str(rows), "before rows that are too long are dropped"),
        *(into if packed else []),
        ("held-out rows", str(held_out or 0), "evaluated before and after training"),
        (f"{unit} per micro-batch", str(args.per_device_train_batch_size), "training.per_device_train_batch_size"),
        ("micro-batches per step", str(args.gradient_accumulation_steps), "training.gradient_accumulation_steps"),
        ("processes", str(args.world_size), "data-parallel size"),
        (f"{unit} per optimizer step", str(per_step), ""),
        ("optimizer steps", steps, "training.max_steps, or training.num_train_epochs passes over the rows"),
    ]


def _model_line(recipe: OfflineRecipe) -> str:
    trainer, path = recipe.trainer(), recipe.model.path or "the model"
    trained = "an adapter is trained" if recipe.model.lora else "all of it is trained"
    if trainer.head == "causal":
        return f"{path}: {trained}"
    outputs = f"{trainer.outputs} output{'s' if trainer.outputs > 1 else ''}"
    return f"{path} as a {trainer.head} classifier with {outputs} (a new head where it has none): {trained}"
