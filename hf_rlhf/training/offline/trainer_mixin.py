"""What a run adds to any class of Trainer: checkpoints that are whole or do not count, the plugin's metrics with every
evaluation, steps that are not finite left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from hf_rlhf.config.recipe_yaml import write_yaml
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.metrics import metrics_of_trainer
from hf_rlhf.metrics.jsonl_log import RunLog
from hf_rlhf.metrics.trackers import install
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.training.offline.trl_compat import Quiet, unrounded
from hf_rlhf.training.parallel import Parallel, gradients_are_finite

if TYPE_CHECKING:
    import datasets

MOST_BAD_STEPS = 3


class FiniteSteps(TrainerCallback):
    """Leaves out optimizer steps whose gradient is not finite; three in a row end the run."""

    def __init__(self) -> None:
        self.left_out = 0
        self.in_a_row = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops the gradient: the optimizer then changes no weight and no moment."""
        if gradients_are_finite(kwargs["model"]):
            self.in_a_row = 0
            return
        self.left_out += 1
        self.in_a_row += 1
        if self.in_a_row >= MOST_BAD_STEPS:
            raise FloatingPointError(
                f"{self.in_a_row} optimizer steps in a row had a gradient that is not finite; the last at step "
                f"{state.global_step + 1}. Lower training.learning_rate, or look at the loss in metrics.jsonl"
            )
        for parameter in kwargs["model"].parameters():
            parameter.grad = None


class Run(Quiet, Trainer):
    """In front of a Trainer class: what a run adds."""

    plugin: OfflineTrainer
    record: dict[str, Any]
    run_log: RunLog
    finite: FiniteSteps

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own. A checkpoint of the last step is loaded, and nothing is trained."""
        if resume_from_checkpoint:
            folder = str(resume_from_checkpoint)
            if checkpoint_manifest.read_manifest(Path(folder))["step"] >= self._last_step():
                self._load_from_checkpoint(folder)
                self.state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
                return TrainOutput(self.state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _last_step(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_epoch = max(1, math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps))
        return math.ceil(self.args.num_train_epochs * per_epoch)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's own, and what the plugin measures."""
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        model: Any = self.model
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            measured = self.plugin.measure(self, dataloader.dataset)
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in measured.items()})
        if not self.is_in_train and self.model_wrapped is self.model:
            Parallel(self.accelerator).forget(model)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own, with the number of steps left out since the last entry."""
        if "loss" in logs:
            logs["health/nonfinite_step"] = self.finite.left_out
            self.finite.left_out = 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's own, then the manifest; older checkpoints go only after it is whole."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with checkpoint_manifest.written_whole(folder, self.args) as limit:
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            facts = {"step": self.state.global_step, "processes": self.args.world_size}
            checkpoint_manifest.seal(folder, {**facts, "resumable": not self.args.save_only_model, **self.record})
            checkpoint_manifest.rotate(folder, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """README.md with the recipe and the versions."""
        if not self.is_world_process_zero():
            return
        base = self.record["recipe"]["model"]["path"]
        local = base is None or base.startswith("builtin:") or Path(base).exists()
        head = {"library_name": "transformers", "tags": ["hf_rlhf", self.plugin.name]}
        head |= {} if local else {"base_model": base}
        versions = ", ".join(f"{name} {version}" for name, version in self.record["versions"].items())
        text = (
            f"---\n{write_yaml(head)}---\n\n# {Path(self.args.output_dir or '.').name}\n\nTrained with hf_rlhf, "
            f"trainer `{self.plugin.name}`.\n\n```yaml\n{write_yaml(self.record['recipe'])}```\n\n{versions}.\n"
        )
        folder = Path(self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(text, encoding="utf-8")


def factory(
    plugin: OfflineTrainer,
    record: dict[str, Any],
    *,
    model: Any,
    tokenizer: Any,
    train: datasets.Dataset,
    evaluation: datasets.Dataset | None,
    callbacks: list[TrainerCallback],
) -> Any:
    """`Materials.trainer`: makes a Trainer class with what a run adds, of this model, tokenizer and data."""

    def trainer(cls: type[Trainer], args: Any, **options: Any) -> Trainer:
        kind: Any = type(cls.__name__, (Run, cls), {"plugin": plugin, "record": record})
        run_log, finite = RunLog(args.output_dir, record), FiniteSteps()
        with unrounded(model):
            made = kind(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=tokenizer,
                callbacks=[finite, *callbacks, run_log],
                **options,
            )
        made.run_log, made.finite = run_log, finite
        if plugin.head != "causal":  # a classifier's own loss is a mean over its micro-batch, whatever it is told
            made.model_accepts_loss_kwargs = False
        made.remove_callback(PrinterCallback)
        install(made.callback_handler, list(args.report_to or ()), run_log, record, metrics_of_trainer(plugin))
        return made

    return trainer


def complete(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords, and TrainingArguments' defaults of the rest: a subclass may have others."""
    from transformers import TrainingArguments

    plain = {
        field.name: field.default
        for field in dataclasses.fields(TrainingArguments)
        if field.init and field.default is not dataclasses.MISSING
    }
    return {**plain, "logging_nan_inf_filter": False, **keywords}
