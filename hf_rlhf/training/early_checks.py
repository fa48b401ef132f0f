"""Checks before a model is loaded, which would otherwise fail or mislead later."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.peak_memory import MIB

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def check_space(memory: Mapping[str, Mapping[str, float]], args: TrainingArguments) -> None:
    """Raise `UserError` if the output folder's disk has less room than the weights, and the optimizer in a checkpoint, take.

    `memory` is a plan's forecast, from which the sizes are: a gradient has the size of the weight that is trained. Without a
    forecast nothing is refused.
    """
    update, checkpoints = (
        memory.get("update", {}),
        str(getattr(args.save_strategy, "value", args.save_strategy)) != "no",
    )
    parts = {"trained weights": update.get("gradients", 0.0)}
    if checkpoints and not args.save_only_model:
        parts["optimizer"] = update.get("optimizer", 0.0)
    folder = Path(args.output_dir or "outputs").absolute()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free / MIB
    if free < sum(parts.values()):
        sizes = ", ".join(f"{name} {size:,.0f} MiB" for name, size in parts.items())
        raise UserError(
            f"no space left for {'a checkpoint' if checkpoints else 'the model'} in {folder}: it takes at least {sizes}, and "
            f"{free:,.0f} MiB are free. Free some, or choose another --output-dir"
            + (" or training.save_only_model=true" if len(parts) > 1 else "")
        )


def warn_of_ragged_epochs(rows: int | None, prompts: int, args: TrainingArguments) -> None:
    """Log how many of `rows` prompts an epoch of whole rollouts leaves out; with `max_steps`, epochs do not count."""
    if rows is not None and rows > prompts and rows % prompts and args.max_steps <= 0 and args.process_index == 0:
        logger.warning(
            "an epoch is %d rollouts of rollout.prompts=%d, which leaves %d of the %d prompts out; the next epoch begins with "
            "them. Set rollout.prompts to a divisor of %d, or training.max_steps, to train on all",
            *(rows // prompts, prompts, rows % prompts, rows, rows),
        )
