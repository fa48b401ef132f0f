"""One run of a recipe, with or without rollouts: build its trainer, evaluate, train, evaluate, save."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.cli.runs.findings import show_finding, show_findings
from hf_rlhf.cli.runs.next_steps import next_steps, plugin_options
from hf_rlhf.config.recipe import OfflineRecipe
from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.checkpoint_manifest import newest
from hf_rlhf.runtime.errors import RunExists, UserError
from hf_rlhf.runtime.hub_push import PushError
from hf_rlhf.runtime.run_folder import only_run_in, run_in
from hf_rlhf.runtime.signals import StoppedError

if TYPE_CHECKING:
    from rich.console import Console

    from hf_rlhf.config.plan import Plan
    from hf_rlhf.config.recipe import Recipe
    from hf_rlhf.metrics.live_view import LiveView
    from hf_rlhf.training.run_trainer import RunTrainer


def check(
    recipe: Recipe, output_dir: str | None = None, trust_remote_code: bool = False, forecast: bool = True
) -> Plan:
    """Return the plan of a recipe on this many processes, with a memory forecast; load no model. Without `forecast`, one that
    cannot be made is left out.

    The forecast runs code that comes with the model only with `trust_remote_code`. Raises `UserError` with every reason for
    refusal.
    """
    from hf_rlhf.training.early_checks import check_space
    from hf_rlhf.training.recipe_checks import checked

    args = recipe.training_arguments(output_dir)
    plan = checked(recipe, args)
    known = {"trust_remote_code": trust_remote_code}
    with nullcontext() if forecast else suppress(Exception):  # a run does not depend on its forecast
        if isinstance(recipe, OfflineRecipe):
            from hf_rlhf.training.offline import setup as offline

            offline.estimate_memory(plan, recipe, args, **known)
        else:
            from hf_rlhf.training import setup

            setup.estimate_memory(plan, recipe.algorithm(), args, recipe.sections, **known)
    check_space(plan.memory, args)
    return plan


def choose_output_dir(asked: str | None, recipe: str, resume: str | bool) -> Path:
    """Return the folder of this run. Raises `RunExists` where it contains another run that is not resumed."""
    if asked is None and isinstance(resume, str):
        return Path(resume).resolve().parent
    # agents of a sweep may start at the same time
    own = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    folder = Path(asked) if asked else Path("outputs") / (f"{recipe}-{own}" if own else recipe)
    if resume or not run_in(folder):
        return folder
    if asked:
        raise RunExists(
            f"{folder} already contains a run. Pass --resume to continue it, or choose another --output-dir"
        )
    return unused(Path("outputs"), recipe)


def unused(parent: Path, name: str) -> Path:
    """Return `parent/name-2`, or with the first higher number that is not taken."""
    number = 2
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def train(
    recipe: Recipe,
    output_dir: str | None = None,
    resume: str | bool = False,
    trust_remote_code: bool = False,
    forecast: bool = False,
    allow_changed: Sequence[str] = (),
    view: LiveView | None = None,
    show_completions: int | None = None,
) -> dict[str, Any]:
    """Run a recipe and return the content of summary.json. Raises `UserError` before the model is loaded.

    `resume` is a checkpoint, or True for the newest one. `forecast` prints the whole plan, with the forecast of the loaded
    model, instead of five lines. `allow_changed` names differences from the checkpoint's run to accept. `view`: where to show
    the run, a new view by default. `show_completions`: print a completion every so many steps.
    """
    from hf_rlhf.metrics.live_view import LiveView
    from hf_rlhf.training.recipe_checks import checked

    if show_completions:
        _check_samples(recipe)
    with view or LiveView() as view:
        folder = choose_output_dir(output_dir, recipe.name, resume)
        with doing("checking the recipe"):
            checked(recipe, recipe.training_arguments(str(folder)))  # before anything is written
        checkpoint = str(newest(folder)) if resume is True else resume or None
        with only_run_in(folder):
            options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_changed": allow_changed}
            return _train(recipe, folder, checkpoint, view, forecast, show_completions, **options)


def _check_samples(recipe: Recipe) -> None:
    """Raise `UserError` where there would be no completions to show."""
    if isinstance(recipe, OfflineRecipe):
        raise UserError(
            f"--show-completions needs rollouts, and {recipe.name} trains on a dataset without them. Leave it out"
        )
    if recipe.logging.completions == 0:
        raise UserError(
            "--show-completions shows those that are logged, and logging.completions is 0. Set logging.completions=1"
        )


def _train(
    recipe: Recipe,
    folder: Path,
    checkpoint: str | None,
    view: LiveView,
    whole_plan: bool,
    sample_every: int | None,
    *,
    trust_remote_code: bool,
    allow_changed: Sequence[str],
) -> dict[str, Any]:
    """Train. The whole plan has a memory forecast of the loaded model and is printed after it."""
    from transformers.utils import logging as transformers_logging

    from hf_rlhf.metrics.console import LiveProgress, show_lines, show_plan
    from hf_rlhf.metrics.live_view import OFFLINE_SHOWN, SHOWN
    from hf_rlhf.training.early_checks import check_space

    transformers_logging.disable_progress_bar()
    out, offline = view.out, isinstance(recipe, OfflineRecipe)
    first = int(os.environ.get("RANK", "0")) == 0

    def announce(plan: Plan) -> None:
        check_space(plan.memory, recipe.training_arguments(str(folder)))
        if first:
            show_lines(plan, out)
            out.print()

    progress = LiveProgress(view, OFFLINE_SHOWN if offline else SHOWN)
    on_plan = None if whole_plan else announce
    trainer = build_trainer(recipe, str(folder), [progress], trust_remote_code, on_plan)
    trainer.doctor.say = show_finding(out)
    if sample_every:
        progress.sample(sample_every, lambda: trainer.run_log.completions)
    try:
        if whole_plan:
            _forecast_memory(trainer, recipe, trust_remote_code)
        if first and whole_plan:
            show_plan(trainer.plan, out)
        samples: dict[str, Any] = {}
        with trainer.stop_on_signal:  # evaluations and the final model included
            if checkpoint is None:
                samples["before"] = _evaluate(trainer)
            trainer.train(resume_from_checkpoint=checkpoint, allow_changed=allow_changed)
            samples["after"] = _evaluate(trainer)
            unpushed = _save(trainer, folder)
            number = trainer.stop_on_signal.agreed(trainer.args)  # one that came after training
        view.stop()
        summary = trainer.summary
        assert summary is not None
        if first:
            _show_end(trainer, recipe, samples, trust_remote_code, out)
        if unpushed is not None:
            raise unpushed
        if number:
            raise StoppedError(number, f"after the run was complete: the model is in {folder}")
        return summary
    finally:
        trainer.close()


def _show_end(
    trainer: RunTrainer, recipe: Recipe, samples: dict[str, Any], trust_remote_code: bool, out: Console
) -> None:
    """Print what the doctor found, held-out metrics before and after, and what to type next."""
    from hf_rlhf.metrics.console import show_result

    summary = trainer.summary or {}
    if trainer.doctor.findings:
        out.print("\n[bold]findings of the doctor[/bold]")
    show_findings(
        trainer.doctor.findings, [f"{trainer.output_dir / 'recipe.yaml'}", *plugin_options(summary["plan"])], out
    )
    trained = recipe.trainer() if isinstance(recipe, OfflineRecipe) else None
    steps = next_steps(recipe, summary["output_dir"], summary["plan"], trust_remote_code)
    show_result(summary, samples, out, trained, steps)
    if trainer.pushed_to:
        out.print(f"pushed to {trainer.pushed_to}", soft_wrap=True)


def build_trainer(
    recipe: Recipe,
    output_dir: str,
    callbacks: list[Any],
    trust_remote_code: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
) -> RunTrainer:
    """Check the recipe, load its model and return its trainer: the one place where recipes with and without rollouts differ.

    `on_plan` gets the plan before the model loads. Raises `UserError` for what is refused.
    """
    from transformers import PrinterCallback

    try:
        if isinstance(recipe, OfflineRecipe):
            from hf_rlhf.training.offline.setup import make_trainer

            return make_trainer(recipe, output_dir, callbacks, trust_remote_code, on_plan)
        from hf_rlhf.training.trainer import RLHFTrainer

        args = recipe.training_arguments(output_dir)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "on_plan": on_plan}
        trainer = RLHFTrainer(None, recipe, args, callbacks=callbacks, **options)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _save(trainer: RunTrainer, folder: Path) -> PushError | None:
    """Save the model, and push it if asked to. Return why it is not on the Hub: the run is complete all the same."""
    try:
        trainer.save_model(str(folder))
    except PushError as error:
        return error
    return None


def _evaluate(trainer: RunTrainer) -> Any:
    """Evaluate where there are held-out rows, and return the completions."""
    if trainer.eval_dataset is None:
        return []
    trainer.evaluate()
    return trainer.samples


def _forecast_memory(trainer: Any, recipe: Recipe, trust_remote_code: bool) -> None:
    """Add the memory forecast to the trainer's plan and to the record of its run."""
    plan = trainer.plan
    if isinstance(recipe, OfflineRecipe):
        from hf_rlhf.training.offline import setup as offline

        known: dict[str, Any] = {"tokens": trainer.longest, "trust_remote_code": trust_remote_code}
        offline.estimate_memory(plan, recipe, trainer.args, **known)
    else:
        from hf_rlhf.data.prompts import Prompts
        from hf_rlhf.training import setup

        parts = trainer.parts
        longest = max(len(ids) for ids, _ in parts.train.tokens) if isinstance(parts.train, Prompts) else None
        if parts.dataset_settings.max_prompt_tokens is not None:
            longest = None
        known = {"model": parts.model, "prompt_tokens": longest, "trust_remote_code": trust_remote_code}
        setup.estimate_memory(plan, parts.algorithm, trainer.args, parts.sections, **known)
    trainer.record["plan"] |= {"memory": plan.memory, "memory_notes": plan.memory_notes}
