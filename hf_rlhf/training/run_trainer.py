"""The part of a run that every trainer shares: its files, its checkpoints, its held-out metrics before and after."""

from __future__ import annotations

import json
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from sys import intern
from types import MappingProxyType
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_utils import SaveStrategy, TrainOutput

from hf_rlhf.config.json_schema import HEADER
from hf_rlhf.config.plan import Plan
from hf_rlhf.config.recipe_yaml import write_yaml
from hf_rlhf.data.fingerprints import Contents
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.metrics.doctor import as_dict
from hf_rlhf.metrics.doctor_callback import DoctorCallback
from hf_rlhf.metrics.jsonl_log import RunLog
from hf_rlhf.metrics.live_view import LiveView
from hf_rlhf.modeling.policy import configure_padding
from hf_rlhf.modeling.saved_form import load_converted
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.distributed import from_first_process
from hf_rlhf.runtime.errors import RunExists, UserError
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.runtime.run_folder import METRICS, only_run_in, remove_run, run_in
from hf_rlhf.runtime.signals import StopOnSignal
from hf_rlhf.training.early_checks import check_space
from hf_rlhf.training.memory.estimate import optimizer_bytes, tensor_bytes
from hf_rlhf.training.offload_checks import optimizer_name
from hf_rlhf.training.sealing_trainer import SealingTrainer
from hf_rlhf.training.step_border import StepBorder, ends_at_once, save_and_end

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "num_tokens", "model_preparation_time")
"""Entries of an evaluation that are not metrics of the model."""


class RunTrainer(SealingTrainer, ABC):
    """`transformers.Trainer` that writes the files of a run.

    `recipe.yaml` is written when training begins, `summary.json` and `report.html` with the model by `save_model`,
    `metrics.jsonl` and `completions/` by `run_log`; `doctor` watches what is logged. Checkpoints count once their manifest is
    written, and resume only the run they come from.
    While it trains, the output folder is locked, and SIGTERM, SIGINT and SIGHUP end the run after its step.
    """

    record: dict[str, Any]
    """Facts about the run that checkpoints and `summary.json` keep."""
    run_log: RunLog
    doctor: DoctorCallback
    end_tracking: Callable[[], Any]
    """End the runs of the trackers in `report_to`."""
    meters: MetricAggregator
    plan: Plan
    started: float
    """`time.perf_counter()` when loading began."""
    samples: Sequence[dict[str, Any]] = ()
    """Completions of the last evaluation; empty without rollouts."""
    intervals: Mapping[str, tuple[float, float]] = MappingProxyType({})
    """The 95 % intervals of the metrics of the last evaluation with rollouts."""
    summary: dict[str, Any] | None = None
    """The content of `summary.json` once it is written."""
    _after: dict[str, float] | None = None
    _trained: TrainOutput | None = None
    _peak_mib: float = 0.0
    _saves_checkpoint: bool = False
    _unlogged: Any = None
    """`loss` of the state that a resumed run starts from: the sum since the last entry of the log, and that entry's step."""
    live_view: LiveView | None = None
    """View on the terminal of a trainer that was made in Python."""
    _owns_folder: bool = False
    _stop: StopOnSignal | None = None
    _border: StepBorder | None = None
    _allowed: Sequence[str] = ()

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.args.output_dir or "outputs")

    @property
    def run_id(self) -> str:
        """Created once per run and kept by a resumed one."""
        return str(self.record["run_id"])

    @property
    def stop_on_signal(self) -> StopOnSignal:
        """Ends training on a signal inside `with`, as `train` does; around more than `train`, it covers that too."""
        if self._stop is None:
            self._stop = StopOnSignal()
            self.add_callback(self._stop)
        return self._stop

    @property
    def border(self) -> StepBorder:
        """The last border between two optimizer steps, to which a failure returns."""
        if self._border is None:
            self._border = StepBorder(weakref.proxy(self))
            self.add_callback(self._border)
        return self._border

    def _begin_run(self) -> None:
        """Create a new run id, the same on every process."""
        self.record["run_id"] = from_first_process(self.accelerator, uuid.uuid4().hex[:12])
        self.record["begun"] = time.time()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        overwrite: bool = False,
        allow_changed: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Train, or resume from a checkpoint; True selects the newest whole one.

        A checkpoint of the last step is loaded without training. `overwrite` replaces the run in the output folder, whose
        checkpoints are deleted. `allow_changed`: names of differences from the checkpoint's run to accept, as errors list them.

        Raises `RunExists` where the output folder contains another run; a second call goes on in the same folder. Raises
        `CheckpointError` for a checkpoint that is damaged or comes from another run, and for state that cannot be saved;
        `FloatingPointError` for gradients or weights that are not finite; `StoppedError` after a signal, with a checkpoint;
        `UserError` where another process is training in the folder, and where its disk has no room for a checkpoint. Whatever
        ends training before an update has begun leaves a checkpoint of the step before, which a note of the exception names.
        """
        self._allowed = tuple(allow_changed)
        with ExitStack() as guards:
            self._claim_folder(guards, fresh=not resume_from_checkpoint, overwrite=overwrite)
            guards.callback(self.finish_checkpoint)  # before another run may have the folder
            if self.live_view is not None:
                guards.callback(self.live_view.stop)  # also after an error
            stop = guards.enter_context(self.stop_on_signal)
            self.record["contents"] = self._contents()
            self.saving = False
            self.border.forget()
            try:
                self._trained = self._train(resume_from_checkpoint, *args, **kwargs)
                if stop.stopped_after is None and stop.agreed(self.args):  # it came after the last step
                    stop.stopped_after = self.state.global_step
                    self._save_checkpoint(self.model_wrapped, None)
                self.finish_checkpoint()
                self.accelerator.wait_for_everyone()  # who reads it next may be another process
            except BaseException as error:
                if ends_at_once(error):
                    raise
                save_and_end(self, self.border, error)
            finally:
                self.border.forget()
            stop.check(self.output_dir)
        self._measure_peak()
        return self._trained

    def _claim_folder(self, guards: ExitStack, fresh: bool, overwrite: bool) -> None:
        """Lock the output folder, and take it for this run. Every process raises what the first one finds."""
        found: UserError | None = None
        if self.is_world_process_zero():
            try:
                guards.enter_context(only_run_in(self.output_dir))
                if fresh and overwrite and not self._owns_folder:
                    remove_run(self.output_dir)
                elif fresh and not self._owns_folder and self._holds_another_run():
                    raise RunExists(
                        f"{self.output_dir} already contains a run. To continue it, train with resume_from_checkpoint; to "
                        "replace it, with overwrite; or choose another output_dir"
                    )
                if self.args.save_strategy != SaveStrategy.NO:
                    check_space({"update": self._sizes()}, self.args)
            except UserError as error:
                found = error
        said = from_first_process(self.accelerator, "" if found is None else str(found))
        if said:
            raise found or UserError(said)
        self._owns_folder = True

    def _sizes(self) -> dict[str, float]:
        """Return what a checkpoint takes at least, in MiB, as the update of a memory forecast names it."""
        trained = tensor_bytes(self.model, trainable=True)
        optimizer = optimizer_bytes(optimizer_name(self.args), trained, [])
        return {"gradients": trained / MIB, "optimizer": optimizer / MIB}

    def _holds_another_run(self) -> bool:
        """Return whether the output folder has more than what this trainer's evaluation before training wrote."""
        return run_in(self.output_dir, but=(METRICS,)) or self.run_log.found_lines

    @doing("training", whole=True)
    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        folder, step = None, 0
        if resume_from_checkpoint:
            newest = resume_from_checkpoint is True
            folder = checkpoint_manifest.newest(self.output_dir) if newest else Path(str(resume_from_checkpoint))
            manifest = self.check_checkpoint(folder)
            self.record["before"], step = manifest.get("before"), manifest["step"]
            self._begin_run()
            self.record |= {name: manifest[name] for name in ("run_id", "begun") if name in manifest}
        elif self.state.global_step > 0:
            self._begin_run()  # Trainer counts from 0 again, from other weights
        recipe = self.record["recipe"]
        self._write("recipe.yaml", HEADER + write_yaml(recipe) if recipe else None)
        if folder is None or step < self._last_step():
            trained: TrainOutput = super().train(None if folder is None else str(folder), *args, **kwargs)
            return trained
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.doctor.read(self.output_dir)
        return TrainOutput(self.state.global_step, 0.0, {})

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train; Trainer has just made the tokenizer's special tokens the model's, whether they have an embedding or not."""
        model, tokenizer = self.model, self.processing_class
        configure_padding(model, tokenizer)  # type: ignore[arg-type]
        return super()._inner_training_loop(*args, **kwargs)

    @abstractmethod
    def _contents(self) -> Contents:
        """Return the fingerprints of what the run reads."""

    @abstractmethod
    def check_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Return the manifest of a checkpoint that this run can resume from; raise `CheckpointError` for any other."""

    @abstractmethod
    def _last_step(self) -> int:
        """Return the number of optimizer steps of the whole run."""

    @doing("evaluation")
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; outside of training, metrics on the run's own evaluation dataset are kept for `summary.json`, each with
        its interval as `_low` and `_high`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and not self.is_in_train:
            found = {name.removeprefix(f"{metric_key_prefix}_"): x for name, x in metrics.items()}
            found = {name: x for name, x in found.items() if name not in TIMINGS}
            for name, (low, high) in self.intervals.items():
                found |= {f"{name}_low": low, f"{name}_high": high} if name in found else {}  # of several, the last's
            if self._trained is None:
                self.record["before"] = found
            else:
                self._after = found
                self._measure_peak()
        return metrics

    @doing("saving")
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; after training, also write `summary.json` into the run's folder.

        A checkpoint is an internal call with a folder. Raises `FloatingPointError` for weights that are not finite.
        """
        if self.is_saved_for_push:
            return
        self._saves_checkpoint = _internal_call and output_dir is not None
        if not self._saves_checkpoint:  # for a checkpoint it is done
            self._check_weights()
        with self.pushes_later():
            super().save_model(output_dir, _internal_call)
        self._write_summary()
        if not self._saves_checkpoint:
            self.create_model_card()
            self.push_saved(asked=not _internal_call)

    def _write_summary(self) -> None:
        if self._saves_checkpoint or self._trained is None:
            return
        self.summary = self._summarize(self._trained)
        self._write("summary.json", json.dumps(self.summary, indent=1))
        if self.is_world_process_zero():
            from hf_rlhf.report.build import write_or_warn

            write_or_warn(self.output_dir)

    def _summarize(self, trained: TrainOutput) -> dict[str, Any]:
        facts = self.facts()
        long = {name: facts.pop(name) for name in ("plan", "versions")}  # at the end, where they hide nothing
        return {
            **facts,
            "after": self._after,
            "steps": trained.global_step,
            "seconds": time.perf_counter() - self.started,
            "train_seconds": trained.metrics.get("train_runtime"),
            "peak_memory_mib": self._peak_mib,
            "findings": [as_dict(finding) for finding in self.doctor.findings],
            "output_dir": str(self.output_dir),
            **long,
        }

    def _measure_peak(self) -> None:
        """Take the peak memory where every process takes part: `save_model` may be called by the first alone."""
        self._peak_mib = self.meters.peak_memory(self.accelerator)

    def _write(self, name: str, text: str | None) -> None:
        if text is not None and self.is_world_process_zero():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / name).write_text(text, encoding="utf-8")

    def _state(self) -> dict[str, Any]:
        """Return what a trainer keeps beside Trainer's own checkpoint, in plain containers: here the loss that is not logged
        yet, and the step of the last entry. It is called after every step: nothing in it waits for the device or changes
        later."""
        loss = getattr(self, "_tr_loss", torch.zeros(()))
        return {"loss": [loss.clone(), getattr(self, "_globalstep_last_logged", 0)]}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Run an epoch; the first one of a resumed run restores the loss since the last entry of the log."""
        if self._unlogged is not None:
            (loss, self._globalstep_last_logged), self._unlogged = self._unlogged, None
            self._tr_loss += loss.to(self._tr_loss.device)
            self._total_loss_scalar -= loss.item()  # `train_loss` is of this call's steps
        return super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a loss that is not finite stays in its entry. Entries, all of which Trainer keeps, share their names."""
        if "loss" in logs and self.is_in_train:
            self._tr_loss.zero_()  # Trainer subtracts it from itself, which keeps a NaN
        try:
            super().log({intern(name): x for name, x in logs.items()}, start_time)
        finally:
            if self.is_in_train:
                self.border.again()  # what the entry holds is not of the next one, even if a callback fails

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save where the control says so; the border is kept after it, as `log` does alone."""
        self.finish_checkpoint(wait=False)  # a failure ends the run now
        due = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if due:
            self.border.again()

    def _load_best_model(self) -> None:
        """Load the best weights, which are not those of the last border."""
        self.border.forget()
        self.finish_checkpoint()
        self.accelerator.wait_for_everyone()
        super()._load_best_model()
        if self.state.best_model_checkpoint:
            load_converted(self.model, Path(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights by Trainer, and those that it skips."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_converted(self.model, Path(resume_from_checkpoint))

    def close(self) -> None:
        """Finish writing, end the runs of trackers, and release what the plugins hold."""
        try:
            self.run_log.flush()
        finally:
            self.end_tracking()
