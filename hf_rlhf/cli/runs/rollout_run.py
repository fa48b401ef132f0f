"""One run of a recipe from the command line: check, evaluate, train, evaluate, save."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.config.recipe import OfflineRecipe
from hf_rlhf.config.training_arguments import DEFAULTS, WITHOUT_EFFECT, ArgumentError
from hf_rlhf.data.prompts import Prompts
from hf_rlhf.runtime.checkpoint_manifest import CheckpointError, newest, read_manifest
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.setup import AlgorithmError, describe, estimate_memory, section_problems

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_rlhf.config.plan import Plan
    from hf_rlhf.config.recipe import Recipe
    from hf_rlhf.runtime.signals import StopOnSignal
    from hf_rlhf.training.trainer import RLHFTrainer

OWN_FILES = ("summary.json", "metrics.jsonl", "recipe.yaml")


def check(recipe: Recipe, output_dir: str = "outputs", trust_remote_code: bool = False) -> Plan:
    """The plan of a recipe on this many processes. Raises `UserError` with every reason for refusal; loads no model. Code that
    comes with the model is run where `trust_remote_code` allows it: without, memory is not estimated for such a one."""
    if isinstance(recipe, OfflineRecipe):
        from hf_rlhf.cli.runs import offline_run

        return offline_run.check(recipe, training_keywords(recipe, output_dir), trust_remote_code)
    from hf_rlhf.data.prompts import check_columns, read_columns

    args = training_arguments(recipe, output_dir)
    try:
        from hf_rlhf.config.training_arguments import check_arguments

        check_arguments(args)
        algorithm = recipe.algorithm()
        lora = recipe.model.lora is not None
        refused = section_problems(algorithm, recipe.sections, lora)
        plan, _ = describe(algorithm, args, lora, refused)
        estimate_memory(plan, algorithm, args, recipe.sections, trust_remote_code=trust_remote_code)
        if recipe.dataset.path is not None:
            columns, rows = read_columns(recipe.dataset)
            check_columns(columns, [plugin for _, plugin in algorithm.plugins()])
            if rows is not None and rows < algorithm.rollout.prompts:
                raise ValueError(
                    f"rollout.prompts={algorithm.rollout.prompts} and the dataset has {rows} rows to train on"
                )
    except (AlgorithmError, ArgumentError, ValueError) as error:
        raise UserError(str(error)) from error
    idle = [name for name in recipe.training if name in WITHOUT_EFFECT]
    plan.remarks += [f"training.{name} has no effect here: {WITHOUT_EFFECT[name]}" for name in idle] + recipe.notes
    return plan


def training_arguments(recipe: Recipe, output_dir: str) -> TrainingArguments:
    """TrainingArguments from the recipe's `training`. Raises `UserError` where transformers refuses them."""
    from transformers import TrainingArguments

    try:
        return TrainingArguments(**training_keywords(recipe, output_dir))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {error}") from error


def training_keywords(recipe: Recipe, output_dir: str) -> dict[str, Any]:
    """Keywords of TrainingArguments: the recipe's over `DEFAULTS`. Raises `UserError` for those that no recipe may have."""
    import torch

    for key, instead in (("output_dir", "--output-dir"), ("resume_from_checkpoint", "--resume")):
        if recipe.training.get(key):
            raise UserError(f"training.{key} is not read from a recipe: say {instead} on the command line")
    if recipe.training.get("hub_token"):
        raise UserError(
            "training.hub_token would be written into the run's record: set HF_TOKEN, or use `hf auth login`"
        )
    cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}  # several processes then meet over gloo
    named = os.environ.get("WANDB_NAME")  # of a stage, STAGED/STAGE, in place of STAGED
    run_name = named + "".join(recipe.name.partition("/")[1:]) if named else recipe.name
    return {**DEFAULTS, **cpu, "run_name": run_name, **recipe.training, "output_dir": output_dir}


def choose_output_dir(asked: str | None, recipe: str, resume: str | bool) -> Path:
    """The folder of this run. Raises `UserError` where another run lives there and is not resumed."""
    if asked is None and isinstance(resume, str):
        return Path(resume).resolve().parent
    # agents of a sweep may start at the same time
    own = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    folder = Path(asked) if asked else Path("outputs") / (f"{recipe}-{own}" if own else recipe)
    taken = any((folder / name).exists() for name in OWN_FILES) or any(folder.glob("checkpoint-*"))
    if resume or not taken:
        return folder
    if asked:
        raise UserError(f"{folder} holds a run already: --resume goes on with it, another --output-dir starts anew")
    number = 2
    while (Path("outputs") / f"{recipe}-{number}").exists():
        number += 1
    return Path("outputs") / f"{recipe}-{number}"


def train(
    recipe: Recipe, output_dir: str | None = None, resume: str | bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Runs the recipe; the summary that is also written to summary.json. Raises `UserError` before the model loads."""
    from hf_rlhf.runtime.signals import StopOnSignal, only_run_in

    folder = choose_output_dir(output_dir, recipe.name, resume)
    if isinstance(recipe, OfflineRecipe):
        from hf_rlhf.cli.runs import offline_run

        keywords = training_keywords(recipe, str(folder))
        return offline_run.train(recipe, keywords, _checkpoint(resume, folder), trust_remote_code)
    plan = check(recipe, str(folder), trust_remote_code)
    checkpoint = _checkpoint(resume, folder)
    with only_run_in(folder), StopOnSignal() as stop:
        return _train(recipe, plan, folder, checkpoint, trust_remote_code, stop)


def _train(
    recipe: Recipe, plan: Plan, folder: Path, checkpoint: str | None, trust_remote_code: bool, stop: StopOnSignal
) -> dict[str, Any]:
    started = time.perf_counter()

    from transformers.utils import logging as transformers_logging

    from hf_rlhf.metrics.console import LiveProgress, console, show_plan, show_result

    transformers_logging.disable_progress_bar()
    args = training_arguments(recipe, str(folder))
    out = console()
    if args.process_index == 0:
        show_plan(plan, out)
    progress = LiveProgress(out)
    trainer = _trainer(recipe, args, [progress, stop], trust_remote_code)
    try:
        if checkpoint is not None:
            trainer.check_checkpoint(Path(checkpoint))
        _write_recipe(trainer, recipe)
        _record_memory(trainer, plan, trust_remote_code)
        samples: dict[str, Any] = {}
        before = _evaluate(trainer, samples, "before") if checkpoint is None else _saved_before(checkpoint)
        trainer.run_log.record["before"] = before
        result = trainer.train(resume_from_checkpoint=checkpoint)
        stop.check(folder)
        after = _evaluate(trainer, samples, "after")
        trainer.save_model(str(folder))
        summary = {
            "recipe": recipe.name,
            "model": recipe.model.path,
            "dataset": recipe.dataset.path,
            "before": before,
            "after": after,
            "steps": result.global_step,
            "seconds": time.perf_counter() - started,
            "train_seconds": result.metrics.get("train_runtime"),
            "peak_memory_mib": trainer.meters.peak_memory(trainer.accelerator),
            "output_dir": str(folder),
            "plan": trainer.run_log.record["plan"],
            "versions": trainer.run_log.record["versions"],
        }
        if trainer.is_world_process_zero():
            (folder / "summary.json").write_text(json.dumps(summary, indent=1))
            show_result(summary, samples, out)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    finally:
        progress.stop()
        trainer.close()
    return summary


def _trainer(recipe: Recipe, args: Any, callbacks: list[Any], trust_remote_code: bool) -> RLHFTrainer:
    from transformers import PrinterCallback

    from hf_rlhf.training.trainer import RLHFTrainer

    try:
        trainer = RLHFTrainer(None, recipe, args, callbacks=callbacks, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _checkpoint(resume: str | bool, folder: Path) -> str | None:
    if not resume:
        return None
    try:
        return str(newest(folder)) if resume is True else str(resume)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def _write_recipe(trainer: RLHFTrainer, recipe: Recipe) -> None:
    if trainer.is_world_process_zero():
        trainer.output_dir.mkdir(parents=True, exist_ok=True)
        (trainer.output_dir / "recipe.yaml").write_text(recipe.dump())


def _record_memory(trainer: RLHFTrainer, plan: Plan, trust_remote_code: bool) -> None:
    """The plan's memory into the run's record, once more where the model or its prompts were not known before."""
    parts = trainer.parts
    longest = max(map(len, parts.train.ids)) if isinstance(parts.train, Prompts) else None
    if not plan.memory or (longest and parts.dataset_settings.max_prompt_tokens is None):
        known = {"model": parts.model, "prompt_tokens": longest, "trust_remote_code": trust_remote_code}
        estimate_memory(plan, parts.algorithm, trainer.args, parts.sections, **known)
    trainer.run_log.record["plan"] |= {"memory": plan.memory, "memory_notes": plan.memory_notes}


def _evaluate(trainer: RLHFTrainer, samples: dict[str, Any], when: str) -> dict[str, float] | None:
    """Metrics on the held-out prompts without Trainer's prefix, or None where there are none."""
    if trainer.eval_dataset is None:
        return None
    metrics = trainer.evaluate()
    samples[when] = trainer.samples
    timings = ("runtime", "samples_per_second", "steps_per_second")
    found = {name.removeprefix("eval_"): x for name, x in metrics.items()}
    return {name: x for name, x in found.items() if name not in (*timings, "epoch")}


def _saved_before(checkpoint: str) -> dict[str, float] | None:
    return read_manifest(Path(checkpoint)).get("before")
