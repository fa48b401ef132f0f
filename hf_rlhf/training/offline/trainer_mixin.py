"""Mixin for any Trainer class: files and checkpoints of a run, the plugin's metrics, non-finite steps skipped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_rlhf.config.sharding import Sharding
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.data.fingerprints import Contents, contents_of, rows_hash
from hf_rlhf.metrics import metrics_of_trainer
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.metrics.doctor_callback import DoctorCallback
from hf_rlhf.metrics.jsonl_log import RunLog
from hf_rlhf.metrics.trackers import install, prepare
from hf_rlhf.modeling.lora_merge import drop_other_form, save_merged
from hf_rlhf.modeling.sharding import WholeModel
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.checkpoint_state import STATE, load_state, plain
from hf_rlhf.training.offline.trl_compat import Quiet, load_metrics_state, metrics_state, unrounded
from hf_rlhf.training.parallel import Parallel, load_optimizer_shards, whole
from hf_rlhf.training.parallel import state_dict as whole_state
from hf_rlhf.training.run_trainer import RunTrainer
from hf_rlhf.training.sharded_models import model_is_whole, shard_plain

if TYPE_CHECKING:
    import datasets

MOST_BAD_STEPS = 3


class FiniteSteps(TrainerCallback):
    """Skip optimizer steps whose gradient is not finite; three in a row end the run."""

    parallel: Parallel

    def __init__(self) -> None:
        self.left_out = 0
        self.in_a_row = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradient, so that the optimizer changes no weight and no moment."""
        if self.parallel.gradients_are_finite(kwargs["model"]):
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


class OfflineRun(Quiet, RunTrainer):
    """Mixin in front of a Trainer class: what a run adds to it."""

    plugin: OfflineTrainer
    finite: FiniteSteps
    longest: int
    """Tokens of the longest row."""
    model_settings: Model
    encoded: datasets.Dataset
    """Rows as the plugin encoded them."""
    parallel: Parallel
    whole: WholeModel | None
    """The twin of a sharded model."""

    def _contents(self) -> Contents:
        """Return the fingerprints of encoded rows, plugin and model."""
        rows = {"of": "the dataset", "hash": rows_hash(self.encoded)}
        return {"dataset": rows, **contents_of([("trainer", self.plugin)], self.model_settings)}

    def check_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Return the manifest of a checkpoint that this run can resume from; raise `CheckpointError` for any other."""
        manifest = checkpoint_manifest.verify(folder)
        checkpoint_manifest.check_same_run(folder, manifest, self.record, self.args.world_size, allowed=self._allowed)
        return manifest

    def _state(self) -> dict[str, Any]:
        finite, plugin = self.finite, plain(self.plugin.state_dict(), f"trainer={self.plugin.name}: state_dict()")
        own = {"bad_steps": finite.in_a_row, "left_out": finite.left_out, "plugin": plugin}
        return super()._state() | own | {"metrics": metrics_state(self)}

    def _saved_weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, whole(x)) for name, x in super()._saved_weights())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, over shards where there are some."""
        self.parallel.reshard()
        return super().create_optimizer(model)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.parallel.clip_grad_norm(model, self.args.max_grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a checkpoint's model, from the shards of every process where there are some."""
        if self.whole is not None:
            model: Any = self.model
            state_dict = whole_state(model, self.args.should_save)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with model_is_whole(self):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with model_is_whole(self):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load Trainer's state, and ours that `_save_checkpoint` wrote beside it; older checkpoints have none."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            optimizer: Any = self.optimizer
            load_optimizer_shards(optimizer)
        rank = self.args.process_index
        if checkpoint is not None and (Path(checkpoint) / STATE.format(rank=rank)).exists():
            state = load_state(Path(checkpoint), rank)
            self.finite.in_a_row, self.finite.left_out = state["bad_steps"], state["left_out"]
            self._unlogged = state.get("loss")
            load_metrics_state(self, state.get("metrics", metrics_state(self)))
            if state["plugin"]:
                self.plugin.load_state_dict(state["plugin"])

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
        """Evaluate as Trainer does, and add what the plugin measures."""
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        model: Any = self.model
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            measured = self.plugin.measure(self, dataloader.dataset)
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in measured.items()})
        self.parallel.reshard()
        if not self.is_in_train and self.model_wrapped is self.model and self.whole is None:
            self.parallel.forget(model)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of steps skipped since the last entry."""
        if "loss" in logs:
            logs["health/nonfinite_step"] = self.finite.left_out
            self.finite.left_out = 0
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint's model as Trainer does; at the end, save model, tokenizer and card, and `summary.json`.

        At the end an adapter is merged unless `model.save_merged` is false.
        """
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        if self.is_saved_for_push:
            return
        self._check_weights()
        folder = Path(output_dir or self.output_dir)
        model = self.parallel.unwrap(self.model)
        adapted = hasattr(model, "peft_config")
        merges = adapted and self.record["recipe"]["model"].get("save_merged") is not False
        with ExitStack() as whole_now:
            if merges and self.whole is not None:
                model = whole_now.enter_context(self.whole.gathered())
            weights = whole_state(model, self.is_world_process_zero())
            if self.is_world_process_zero():
                (save_merged if merges else type(model).save_pretrained)(model, folder, state_dict=weights)
        if self.is_world_process_zero():
            if adapted:
                drop_other_form(folder, merges)
            tokenizer: Any = self.processing_class
            tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        self._saves_checkpoint = False
        self._write_summary()
        self.create_model_card()
        self.push_saved(asked=not _internal_call)

    def close(self) -> None:
        """Finish writing, and close the plugin."""
        super().close()
        self.plugin.close()


def factory(
    plugin: OfflineTrainer,
    record: dict[str, Any],
    settings: Model,
    *,
    model: Any,
    tokenizer: Any,
    train: datasets.Dataset,
    evaluation: datasets.Dataset | None,
    callbacks: list[TrainerCallback],
    sharding: Sharding | None = None,
) -> Any:
    """Return `Materials.trainer`, which makes a Trainer class with `OfflineRun` in front, of this model, tokenizer and data."""

    def trainer(cls: type[Trainer], args: Any, **options: Any) -> Trainer:
        kind: Any = type(cls.__name__, (OfflineRun, cls), {"plugin": plugin, "record": record})
        run_log, finite = RunLog(args.output_dir, record), FiniteSteps()
        doctor = DoctorCallback(record["recipe"] or {}, metrics_of_trainer(plugin))
        prepare(args)
        with unrounded(model):
            made = kind(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=tokenizer,
                callbacks=[finite, *callbacks, run_log, doctor],
                **options,
            )
        made.run_log, made.doctor, made.finite = run_log, doctor, finite
        made.parallel = finite.parallel = Parallel(made.accelerator, sharding)
        made.whole = shard_plain(made.parallel, made.model, getattr(made, "ref_model", None))
        made.meters = MetricAggregator(made.args.device)
        if plugin.head != "causal":  # a classifier's own loss is a mean over its micro-batch, whatever it is told
            made.model_accepts_loss_kwargs = False
        made.encoded, made.model_settings = train, settings
        made._begin_run()
        made.remove_callback(PrinterCallback)
        made.end_tracking = install(made.callback_handler, args, run_log, doctor, record)
        return made

    return trainer


def complete(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords over TrainingArguments' own defaults: a subclass may have other defaults."""
    from transformers import TrainingArguments

    plain = {
        field.name: field.default
        for field in dataclasses.fields(TrainingArguments)
        if field.init and field.default is not dataclasses.MISSING
    }
    return {**plain, "logging_nan_inf_filter": False, **keywords}
