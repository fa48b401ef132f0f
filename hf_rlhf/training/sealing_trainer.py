"""Checkpoints that are written at the border of a step, and hashed, flushed and sealed while the next one runs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from hf_rlhf.metrics.jsonl_log import RunLog
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.checkpoint_state import first_non_finite, save_state
from hf_rlhf.training.hub_trainer import PushingTrainer
from hf_rlhf.training.parallel import optimizer_state
from hf_rlhf.training.step_border import StepBorder


class SealingTrainer(PushingTrainer, ABC):
    """`transformers.Trainer` whose checkpoints count once a thread has written their manifest.

    That has ended before the next checkpoint is written, before the best model is loaded, before `train` returns or raises, and
    before `on_save` of callbacks that may read the checkpoint.
    """

    run_log: RunLog
    saving: bool = False
    """True while a checkpoint is being written, and after that failed."""
    _sealing: Future[None] | None = None
    """The last checkpoint, while a thread completes it."""

    @property
    @abstractmethod
    def border(self) -> StepBorder:
        """The last border between two optimizer steps."""

    def _saved_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors to save, by name: the policy's, or those of its adapter."""
        return weights_of("policy", self.model)

    def _check_weights(self) -> None:
        if name := first_non_finite(self._saved_weights()):
            raise FloatingPointError(
                f"weights must be finite, got an infinity or a NaN in {name} at step {self.state.global_step}. "
                "Resume from the newest checkpoint, with a lower training.learning_rate or training.max_grad_norm"
            )

    @doing("saving")
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save Trainer's checkpoint, then `_state`; a thread then writes the manifest, and deletes older checkpoints."""
        self.finish_checkpoint()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self._check_weights()
        state = self.border.state()  # before anything is written: it may be refused
        self.run_log.write_sample()
        self.saving = True
        with checkpoint_manifest.written_whole(folder, self.args):
            self.accelerator.wait_for_everyone()  # the folder is empty
            super()._save_checkpoint(model, trial)
            if state is not None:
                save_state(folder, self.args.process_index, state)
            self.accelerator.wait_for_everyone()
        self.saving = False
        if self.args.should_save:
            self._seal(folder)
        if not self.is_in_train or any(reads_checkpoints(x) for x in self.callback_handler.callbacks):
            self.finish_checkpoint()

    def _seal(self, folder: Path) -> None:
        facts = {"step": self.state.global_step, "processes": self.args.world_size}
        facts |= {"resumable": not self.args.save_only_model, **copy.deepcopy(self.record)}
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint

        def seal() -> None:
            checkpoint_manifest.seal(folder, facts)
            checkpoint_manifest.rotate(folder, limit, best)

        pool = ThreadPoolExecutor(1, thread_name_prefix="hf_rlhf-seal")
        self._sealing = pool.submit(seal)
        pool.shutdown(wait=False)

    def finish_checkpoint(self, wait: bool = True) -> None:
        """Wait until the last checkpoint counts. Raises why it does not, once; without `wait`, if that is known by now."""
        sealing = self._sealing
        if sealing is not None and (wait or sealing.done()):
            self._sealing = None
            sealing.result()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save optimizer and schedule as Trainer does, with the optimizer's whole tensors."""
        if not self.saving:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self._optimizer_state()
        if self.args.should_save:
            schedule = self.lr_scheduler
            assert schedule is not None
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state with whole tensors, on the processes that save. All processes call it together."""
        optimizer = self.optimizer
        assert optimizer is not None
        return optimizer_state(optimizer, self.args.should_save)


def reads_checkpoints(callback: TrainerCallback) -> bool:
    """Return whether a callback may read a checkpoint in `on_save`: one that has the event, and does not say otherwise."""
    return type(callback).on_save is not TrainerCallback.on_save and getattr(callback, "reads_checkpoints", True)


def weights_of(title: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module that are saved, by name; of a model with an adapter, those that are trained."""
    if hasattr(module, "peft_config"):
        return ((f"{title}.{name}", p) for name, p in module.named_parameters() if p.requires_grad)
    return ((f"{title}.{name}", x) for name, x in module.state_dict().items())
