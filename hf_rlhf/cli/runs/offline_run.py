"""One run of a recipe without rollouts from the command line: check, evaluate, train, evaluate, save."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.config.plan import Plan
from hf_rlhf.config.recipe import OfflineRecipe
from hf_rlhf.config.training_arguments import DECISIVE
from hf_rlhf.contract.offline_trainer import Materials, OfflineTrainer
from hf_rlhf.data.offline_rows import encode, longest, read_rows
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.checkpoint_manifest import CheckpointError
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.offline.trainer_mixin import complete

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from hf_rlhf.runtime.signals import StopOnSignal

UNTESTED = "it is untested here; use one process per device (DistributedDataParallel) in float32 or with bf16"
NO_LOGITS = "held-out metrics are the trainer's own (`measure`)"
REFUSED: dict[str, str] = {
    "auto_find_batch_size": "the batches would not be those of the plan; set per_device_train_batch_size",
    "label_smoothing_factor": "the trainer has its own loss and would not read it",
    "ignore_data_skip": "a resumed run goes on exactly where it was",
    "fp16": UNTESTED,
    "fp16_full_eval": UNTESTED,
    "fsdp": UNTESTED,
    "deepspeed": UNTESTED,
    "parallelism_config": UNTESTED,
    "torch_compile": "compiled forwards are untested here",
    "use_liger_kernel": "its kernels are untested here",
    "batch_eval_metrics": NO_LOGITS,
    "include_for_metrics": NO_LOGITS,
    "enable_jit_checkpoint": "its checkpoint mixes the states of two moments; use save_steps",
    "debug": "the underflow tracer and TPU debugging are untested here",
}
"""Argument -> what to do instead. Refused when it differs from its default."""
DATA_ORDER = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy")
"""Arguments that a resumed run must share with its checkpoint, besides `DECISIVE`."""


def check(recipe: OfflineRecipe, keywords: Mapping[str, Any], trust_remote_code: bool = False) -> Plan:
    """The plan on this many processes. Raises `UserError` with every reason for refusal; loads no model. Code that comes with
    the model is run where `trust_remote_code` allows it: without, memory is not estimated for such a one."""
    from transformers import TrainingArguments

    args = _made(TrainingArguments, keywords)
    _check_arguments(args)
    trainer = recipe.trainer()
    _check_model(recipe, trainer)
    plan = Plan(plugins=get_host().manifest([type(trainer)]))
    plan.models.append(_model_line(recipe))
    train = held_out = None
    if recipe.rows.path is not None:
        train, held_out = read_rows(recipe.rows, trainer)
        if held_out is None:
            plan.skipped.append(
                "evaluation: no rows are held out (dataset.held_out, dataset.eval_split, dataset.eval_path)"
            )
    plan.arithmetic = _arithmetic(
        args, trainer, None if train is None else len(train), None if held_out is None else len(held_out)
    )
    plan.remarks += recipe.notes
    _estimate_memory(plan, recipe, args, trust_remote_code=trust_remote_code)
    return plan


def train(
    recipe: OfflineRecipe, keywords: dict[str, Any], found: str | None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Runs the recipe; the summary that is also written to summary.json. `found`: the checkpoint to go on from."""
    from hf_rlhf.runtime.signals import StopOnSignal, only_run_in

    plan = check(recipe, keywords, trust_remote_code)
    with only_run_in(Path(keywords["output_dir"])), StopOnSignal() as stop:
        return _train(recipe, keywords, plan, found, trust_remote_code, stop)


def _train(
    recipe: OfflineRecipe,
    keywords: dict[str, Any],
    plan: Plan,
    found: str | None,
    trust_remote_code: bool,
    stop: StopOnSignal,
) -> dict[str, Any]:
    started = time.perf_counter()

    from transformers.utils import logging as transformers_logging

    from hf_rlhf.metrics.console import OFFLINE_SHOWN, LiveProgress, console, show_offline_result, show_plan

    transformers_logging.disable_progress_bar()
    out = console()
    if int(os.environ.get("RANK", "0")) == 0:
        show_plan(plan, out)
    progress = LiveProgress(out, OFFLINE_SHOWN)
    trainer = make(recipe, keywords, plan, [progress, stop], trust_remote_code)
    folder, record = Path(keywords["output_dir"]), trainer.record
    try:
        if found is not None:
            manifest = checkpoint_manifest.verify(Path(found))
            checkpoint_manifest.check_same_run(Path(found), manifest, record, trainer.args.world_size)
        if trainer.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(recipe.dump())
        before = _evaluate(trainer) if found is None else manifest.get("before")
        record["before"] = before
        result = trainer.train(resume_from_checkpoint=found)
        stop.check(folder)
        after = _evaluate(trainer)
        save(trainer, folder)
        summary = {
            "recipe": recipe.name,
            "model": recipe.model.path,
            "dataset": recipe.rows.path,
            "rows": record["run"]["rows"],
            "before": before,
            "after": after,
            "steps": result.global_step,
            "seconds": time.perf_counter() - started,
            "train_seconds": result.metrics.get("train_runtime"),
            "output_dir": str(folder),
            "plan": record["plan"],
            "versions": record["versions"],
        }
        if trainer.is_world_process_zero():
            (folder / "summary.json").write_text(json.dumps(summary, indent=1))
            show_offline_result(summary, trainer.plugin.reward, out)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    finally:
        progress.stop()
        trainer.run_log.flush()
        trainer.plugin.close()
    return summary


def make(
    recipe: OfflineRecipe,
    keywords: Mapping[str, Any],
    plan: Plan,
    callbacks: list[Any],
    trust_remote_code: bool = False,
) -> Any:
    """The recipe's trainer, with what a run adds. Rows are encoded, and refused, before the model is loaded."""
    from hf_rlhf.data.model_loading import load_tokenizer
    from hf_rlhf.training.offline.model import context_of, load_with_head
    from hf_rlhf.training.offline.trainer_mixin import Run, factory
    from hf_rlhf.training.setup import versions

    plugin = recipe.trainer()
    arguments = complete(keywords)
    train_rows, held_out = read_rows(recipe.rows, plugin)
    tokenizer = load_tokenizer(recipe.model, trust_remote_code)
    context = context_of(recipe.model, trust_remote_code)
    train = encode(train_rows, plugin, tokenizer, context, "dataset")
    evaluation = None
    if held_out is not None:
        evaluation = encode(held_out, plugin, tokenizer, context, "evaluation dataset")
    model = load_with_head(recipe.model, plugin, tokenizer, arguments["seed"], trust_remote_code)
    rows = {"train": len(train), "evaluation": 0 if evaluation is None else len(evaluation)}
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
        "plan": plan.as_dict(),
        "versions": versions(),
    }
    record = json.loads(json.dumps(record, default=str))  # as a checkpoint's manifest gives it back
    shared: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "train": train, "evaluation": evaluation}
    made = factory(plugin, record, **shared, callbacks=callbacks)
    try:
        trainer = plugin.build(Materials(**shared, arguments=arguments, trainer=made))
    except ValueError as error:
        raise UserError(f"trainer={plugin.name}: {error}") from error
    if not isinstance(trainer, Run):
        raise UserError(
            f"trainer={plugin.name}: build must give what materials.trainer(cls, args) makes, not a "
            f"{type(trainer).__name__}: its checkpoints and its evaluation would not be the run's"
        )
    tokens = max(longest(part) for part in (train, evaluation) if part is not None)
    _estimate_memory(plan, recipe, trainer.args, tokens, trust_remote_code)
    packed: Any = trainer.train_dataset
    plan.arithmetic = _arithmetic(trainer.args, plugin, len(train), rows["evaluation"], len(packed))
    record["plan"] = json.loads(json.dumps(plan.as_dict()))
    return trainer


def save(trainer: Any, folder: Path) -> None:
    """The model, an adapter merged into it unless `model.save_merged` is false, its tokenizer and its card, as the reward that
    it is for reads them."""
    from hf_rlhf.modeling.lora_merge import drop_other_form, save_merged
    from hf_rlhf.training.parallel import Parallel, state_dict

    if trainer.is_world_process_zero():
        model = Parallel(trainer.accelerator).unwrap(trainer.model)
        adapted = hasattr(model, "peft_config")
        whole = adapted and trainer.record["recipe"]["model"].get("save_merged") is not False
        (save_merged if whole else type(model).save_pretrained)(model, folder, state_dict=state_dict(model))
        if adapted:
            drop_other_form(folder, whole)
        trainer.processing_class.save_pretrained(folder)
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()


def _made(cls: Any, keywords: Mapping[str, Any]) -> TrainingArguments:
    try:
        made: TrainingArguments = cls(**keywords)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {error}") from error
    return made


def _check_arguments(args: TrainingArguments) -> None:
    """Raises `UserError` naming every refused argument and what to use instead."""
    defaults = complete({})
    refused = [
        f"training.{name}={getattr(args, name)!r} is refused: {instead}"
        for name, instead in REFUSED.items()
        if getattr(args, name, None) not in (defaults.get(name), None, False, "no", [], "", 0)
    ]
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        refused.append(
            f"a launcher started {started} processes and there is no accelerator for them: set training.use_cpu"
        )
    if args.n_gpu > 1:
        refused.append(
            f"{args.n_gpu} GPUs in one process would use nn.DataParallel, which is refused: start one process per GPU with "
            "`accelerate launch -m hf_rlhf train ...`, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if refused:
        raise UserError("\n".join(refused))


def _check_model(recipe: OfflineRecipe, trainer: OfflineTrainer) -> None:
    """Raises `UserError` naming every setting of the model that cannot be."""
    from hf_rlhf.data.quantization import model_problems

    problems = model_problems(recipe.model, recipe.model.lora is not None, [("trainer", trainer)])
    problems += trainer.problems(recipe.model)
    if problems:
        raise UserError("\n".join(problems))


def _estimate_memory(
    plan: Plan,
    recipe: OfflineRecipe,
    args: TrainingArguments,
    tokens: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Fill the plan's memory forecast; `tokens` are those of the longest row, if known."""
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
    """`sequences`: how many the rows have been packed into, where that is known."""
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
        (f"{unit} of a micro-batch", str(args.per_device_train_batch_size), "training.per_device_train_batch_size"),
        ("micro-batches per step", str(args.gradient_accumulation_steps), "training.gradient_accumulation_steps"),
        ("processes", str(args.world_size), "data-parallel size"),
        (f"{unit} per optimizer step", str(per_step), ""),
        ("optimizer steps", steps, "training.max_steps, or training.num_train_epochs passes over the rows"),
    ]


def _model_line(recipe: OfflineRecipe) -> str:
    trainer, path = recipe.trainer(), recipe.model.path or "the model"
    trained = "an adapter" if recipe.model.lora else "all of it"
    if trainer.head == "causal":
        return f"{path}: {trained} is trained"
    outputs = f"{trainer.outputs} output{'s' if trainer.outputs > 1 else ''}"
    return f"{path} as a classifier of {trainer.head}s with {outputs}, its head new where it has none: {trained} is trained"


def _evaluate(trainer: Trainer) -> dict[str, float] | None:
    """Metrics on the held-out rows without Trainer's prefix, or None where there are none."""
    if trainer.eval_dataset is None:
        return None
    metrics = trainer.evaluate()
    timings = ("runtime", "samples_per_second", "steps_per_second", "epoch", "num_tokens", "model_preparation_time")
    found = {name.removeprefix("eval_"): x for name, x in metrics.items()}
    return {name: x for name, x in found.items() if name not in timings}
