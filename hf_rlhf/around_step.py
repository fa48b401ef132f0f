"""What happens beside an optimizer step, called by Trainer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from hf_rlhf.trainer import RLHFTrainer


class AroundStep(TrainerCallback):
    """What an optimizer step finds, and what follows it: reference and average move, the update rule is asked what it
    measured."""

    def __init__(self, trainer: RLHFTrainer):
        self.trainer = weakref.proxy(trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer when the gradients are there."""
        self.trainer.phases.stepping()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer before anything is logged or saved."""
        trainer = self.trainer
        if (model := trainer.moving_reference()) is not None:
            trainer.algorithm.reference.move(model, trainer.model, state.global_step)
            trainer.phases.moved()
        if trainer.ema is not None:
            trainer.ema.update()
        for name, x in trainer.algorithm.optimizer.take_logs().items():
            trainer.meters.put(f"optimizer/{name}", x)
