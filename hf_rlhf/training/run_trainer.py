"""The part of a run that every trainer shares: its files, its checkpoints, its held-out metrics before and after."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from hf_rlhf.config.plan import Plan
from hf_rlhf.config.recipe_yaml import write_yaml
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.metrics.jsonl_log import RunLog
from hf_rlhf.modeling.policy import configure_padding
from hf_rlhf.runtime import checkpoint_manifest

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "num_tokens", "model_preparation_time")
"""Entries of an evaluation that are not metrics of the model."""


class RunTrainer(Trainer):
    """`transformers.Trainer` that writes the files of a run.

    `recipe.yaml` is written when training begins, `summary.json` with the model by `save_model`, `metrics.jsonl` and
    `completions/` by `run_log`. Checkpoints count once their manifest is written, and resume only the run they come from.
    """

    record: dict[str, Any]
    """Facts about the run that checkpoints and `summary.json` keep."""
    run_log: RunLog
    end_tracking: Callable[[], Any]
    """End the runs of the trackers in `report_to`."""
    meters: MetricAggregator
    plan: Plan
    started: float
    """`time.perf_counter()` when loading began."""
    samples: Sequence[dict[str, Any]] = ()
    """Completions of the last evaluation; empty without rollouts."""
    summary: dict[str, Any] | None = None
    """The content of `summary.json` once it is written."""
    _after: dict[str, float] | None = None
    _trained: TrainOutput | None = None
    _peak_mib: float = 0.0
    _saves_checkpoint: bool = False

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.args.output_dir or "outputs")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume from a checkpoint; True selects the newest whole one.

        A checkpoint of the last step is loaded without training. Raises `CheckpointError` for a checkpoint that is damaged or
        comes from another run.
        """
        folder, step = None, 0
        if resume_from_checkpoint:
            newest = resume_from_checkpoint is True
            folder = checkpoint_manifest.newest(self.output_dir) if newest else Path(str(resume_from_checkpoint))
            manifest = self.check_checkpoint(folder)
            self.record["before"], step = manifest.get("before"), manifest["step"]
        self._write("recipe.yaml", write_yaml(self.record["recipe"]) if self.record["recipe"] else None)
        if folder is not None and step >= self._last_step():
            self._load_from_checkpoint(str(folder))
            self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            self._trained = TrainOutput(self.state.global_step, 0.0, {})
        else:
            self._trained = super().train(None if folder is None else str(folder), *args, **kwargs)
        self._measure_peak()
        return self._trained

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train; Trainer has just made the tokenizer's special tokens the model's, whether they have an embedding or not."""
        model, tokenizer = self.model, self.processing_class
        configure_padding(model, tokenizer)  # type: ignore[arg-type]
        return super()._inner_training_loop(*args, **kwargs)

    def check_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Return the manifest of a checkpoint that this run can resume from; raise `CheckpointError` for any other."""
        raise NotImplementedError

    def _last_step(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        raise NotImplementedError

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; outside of training, metrics on the run's own evaluation dataset are kept for `summary.json`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and not self.is_in_train:
            found = {name.removeprefix(f"{metric_key_prefix}_"): x for name, x in metrics.items()}
            found = {name: x for name, x in found.items() if name not in TIMINGS}
            if self._trained is None:
                self.record["before"] = found
            else:
                self._after = found
                self._measure_peak()
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; after training, also write `summary.json` into the run's folder.

        A checkpoint is an internal call with a folder.
        """
        self._saves_checkpoint = _internal_call and output_dir is not None
        super().save_model(output_dir, _internal_call)
        self._write_summary()

    def _write_summary(self) -> None:
        if self._saves_checkpoint or self._trained is None:
            return
        self.summary = self._summarize(self._trained)
        self._write("summary.json", json.dumps(self.summary, indent=1))

    def _summarize(self, trained: TrainOutput) -> dict[str, Any]:
        run = self.record["run"]
        return {
            "recipe": self.record["name"],
            "model": run["model"]["path"],
            "dataset": run["dataset"]["path"],
            "rows": self.record["rows"],
            "before": self.record.get("before"),
            "after": self._after,
            "steps": trained.global_step,
            "seconds": time.perf_counter() - self.started,
            "train_seconds": trained.metrics.get("train_runtime"),
            "peak_memory_mib": self._peak_mib,
            "output_dir": str(self.output_dir),
            "plan": self.record["plan"],
            "versions": self.record["versions"],
        }

    def _measure_peak(self) -> None:
        """Take the peak memory where every process takes part: `save_model` may be called by the first alone."""
        self._peak_mib = self.meters.peak_memory(self.accelerator)

    def _write(self, name: str, text: str | None) -> None:
        if text is not None and self.is_world_process_zero():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / name).write_text(text, encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save Trainer's checkpoint, then `_save_state`, then the manifest; delete older checkpoints once it is written."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with checkpoint_manifest.written_whole(folder, self.args) as limit:
            super()._save_checkpoint(model, trial)
        self._save_state(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            facts = {"step": self.state.global_step, "processes": self.args.world_size}
            checkpoint_manifest.seal(folder, {**facts, "resumable": not self.args.save_only_model, **self.record})
            checkpoint_manifest.rotate(folder, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save_state(self, folder: Path) -> None:
        """Write what a trainer keeps beside Trainer's own checkpoint."""

    def close(self) -> None:
        """Finish writing, end the runs of trackers, and release what the plugins hold."""
        try:
            self.run_log.flush()
        finally:
            self.end_tracking()
