"""The end of a run whose step failed: a checkpoint of the border before that step."""

from __future__ import annotations

import logging
import random
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import TrainerCallback

from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.errors import CheckpointError
from hf_rlhf.training.whereabouts import FOLDER, LostProcess, Whereabouts, bound_waits, is_collective

logger = logging.getLogger(__name__)
PATIENCE = timedelta(seconds=20)
"""Time that a process whose step failed waits for the others to fail too."""


@dataclass(frozen=True)
class Kept:
    """The state of a run at a border without weights and optimizer: random generators, and what `_state` returns."""

    step: int
    generators: tuple[Any, Any, Any, Any]
    state: dict[str, Any] | None


class StepBorder(TrainerCallback):
    """Keep the state of a run at each border between two optimizer steps.

    Until the next update begins, weights and optimizer are as they were at the border. A failure before that can therefore be
    saved as a checkpoint of the border: the run that resumes from it is the run without the failure.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.kept: Kept | None = None
        """None before the first step and while an update is under way."""
        self._returned: Kept | None = None
        self._group: Any = None
        args = trainer.args
        bound_waits(args)
        place = trainer.output_dir / FOLDER, args.process_index, args.world_size
        self.whereabouts = Whereabouts(*place, step=lambda: trainer.state.global_step)

    def forget(self) -> None:
        """Forget the border, as before and after a run."""
        self.kept = self._returned = None
        self.whereabouts.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the group in which processes ask each other whether they failed."""
        if args.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        if args.world_size > 1:
            self.whereabouts.begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop noting what this process does."""
        if args.world_size > 1:
            self.whereabouts.end()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the border: weights change from here."""
        self.kept = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the border after a step."""
        self.keep()

    def again(self) -> None:
        """Keep the border again, where logging or evaluating has moved the state on."""
        if self.kept is not None:
            self.keep()

    def keep(self) -> None:
        """Keep the state, without waiting for the device. What `_state` returns does not change afterwards."""
        try:
            state = self._trainer._state()
        except CheckpointError:  # state that no checkpoint can hold
            self.kept = None
            return
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        generators = random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda
        self.kept = Kept(self._trainer.state.global_step, generators, state)

    def state(self) -> dict[str, Any] | None:
        """Return the state that a checkpoint holds: that of now, or after a failure that of the border."""
        return self._trainer._state() if self._returned is None else self._returned.state

    def go_back(self) -> None:
        """Go back to the border: drop gradients, restore the random generators, and let checkpoints hold its state."""
        assert self.kept is not None
        self._returned = self.kept
        python, numpy, cpu, cuda = self.kept.generators
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        self._trainer.model_wrapped.zero_grad()

    def all_failed(self) -> bool:
        """Return whether every process failed at the same border. A process that does not answer in time has not."""
        own = -1 if self.kept is None else self.kept.step
        if self._group is None:
            return own >= 0
        try:
            torch.distributed.monitored_barrier(self._group)
            steps: list[Any] = [None] * torch.distributed.get_world_size(self._group)
            torch.distributed.all_gather_object(steps, own, group=self._group)
        except RuntimeError:
            return False
        return own >= 0 and set(steps) == {own}


def save_and_end(trainer: Any, border: StepBorder, error: BaseException) -> NoReturn:
    """Save the border before a failure if there is one, and raise the error with a note of where the run can go on.

    `sys.exit` of a plugin becomes a `RuntimeError`: a run that did not finish never ends with exit code 0.
    """
    lost = border.whereabouts.missing() if is_collective(error) else ""
    note = _save(trainer, border)
    raised: BaseException = error
    if lost:
        raised = LostProcess(lost)
        raised.__cause__, raised.__traceback__ = error, error.__traceback__
    elif isinstance(error, SystemExit):
        raised = RuntimeError(f"the run was ended by sys.exit({error.code!r}) in a plugin or a callback")
        raised.__cause__, raised.__traceback__ = error, error.__traceback__
    raised.add_note(note)
    raise raised


def _save(trainer: Any, border: StepBorder) -> str:
    """Save the border, and return where the run can go on."""
    try:
        trainer.finish_checkpoint()
    except Exception as error:
        logger.warning("a checkpoint was not completed: %s", error)
    known = _newest(trainer.output_dir)
    folder = trainer.output_dir / f"checkpoint-{trainer.state.global_step}"
    if trainer.saving or folder == known or not border.all_failed():
        return _go_on(known)
    try:
        border.go_back()
        trainer._save_checkpoint(trainer.model_wrapped, None)
        trainer.finish_checkpoint()
    except Exception as error:
        return f"no checkpoint could be saved ({error}); {_go_on(known)}"
    return _go_on(folder)


def _newest(output_dir: Path) -> Path | None:
    try:
        return checkpoint_manifest.newest(output_dir)
    except CheckpointError:
        return None


def _go_on(folder: Path | None) -> str:
    if folder is None:
        return "there is no checkpoint to resume from"
    return f"{folder} is whole: `hf-rlhf train --resume` or train(resume_from_checkpoint=True) goes on from there"


def ends_at_once(error: BaseException) -> bool:
    """Return whether an error is the wish to stop now, without saving: a second signal, or a generator that is closed."""
    return isinstance(error, KeyboardInterrupt | GeneratorExit) or sys.is_finalizing()
