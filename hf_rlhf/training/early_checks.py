"""Checks before a model is loaded, which would otherwise fail or mislead later."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.batch import Rollouts
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.data.prompts import Prompts
from hf_rlhf.data.sources import DatasetError
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.scoring.scorer import applies

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
            f"{free:,.0f} MiB are free. Free some, or choose another output folder"
            + (" or training.save_only_model=true" if len(parts) > 1 else "")
        )


def check_prompts(prompts: Any, algorithm: Algorithm, chat_template_kwargs: dict[str, Any]) -> None:
    """Check that reward sources can read the prompts that they apply to. Raises `DatasetError`. A stream is not read."""
    if not isinstance(prompts, Prompts):
        return
    for label, source in zip(algorithm.labels(), algorithm.rewards, strict=True):
        if (check := source.prompt_check(chat_template_kwargs)) is None:
            continue
        for index, prompt in enumerate(prompts):
            columns = {name: [value] for name, value in prompt.columns.items()}
            row = Rollouts(
                prompts=[prompt.prompt],
                completions=[""],
                prompt_ids=[prompt.ids],
                completion_ids=[[]],
                masks=[[]],
                finish_reasons=["stop"],
                columns=columns,
            )
            if applies(f"reward {label!r}", source.when, row, 0):
                try:
                    check(prompt.prompt)
                except ValueError as error:
                    number = prompts.rows.number(index)
                    raise DatasetError(f"dataset, row {number} (the first is 1): {error}") from error


def warn_of_ragged_epochs(rows: int | None, prompts: int, args: TrainingArguments) -> None:
    """Log how many of `rows` prompts an epoch of whole rollouts leaves out; with `max_steps`, epochs do not count."""
    if rows is not None and rows > prompts and rows % prompts and args.max_steps <= 0 and args.process_index == 0:
        logger.warning(
            "an epoch is %d rollouts of rollout.prompts=%d, which leaves %d of the %d prompts out; the next epoch begins with "
            "them. Set rollout.prompts to a divisor of %d, or training.max_steps, to train on all",
            *(rows // prompts, prompts, rows % prompts, rows, rows),
        )
