"""Checks of the optimizer and the schedule in TrainingArguments, by building them for one parameter."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

BELOW = {
    "learning_rate": math.inf,
    "weight_decay": math.inf,
    "adam_beta1": 1.0,
    "adam_beta2": 1.0,
    "adam_epsilon": math.inf,
}
"""Argument -> the bound that it must be below; each must be at least 0."""


def optimizer_problems(args: TrainingArguments) -> Iterator[str]:
    """Yield why the optimizer or the schedule of these arguments cannot be built, or does not do what was asked."""
    wrong = [name for name, bound in BELOW.items() if not 0 <= getattr(args, name) < bound]
    for name in wrong:
        bound = "finite" if BELOW[name] == math.inf else "below 1"
        yield f"training.{name} must be at least 0 and {bound}, got {getattr(args, name)}"
    if not wrong:
        yield from _building_problems(args)


def _building_problems(args: TrainingArguments) -> Iterator[str]:
    import torch
    from transformers import get_scheduler

    name = getattr(args.optim, "value", args.optim)
    pairs = [pair.partition("=")[:2] for pair in (args.optim_args or "").replace(" ", "").split(",") if args.optim_args]
    if not all(equals for _, equals in pairs):
        yield f"training.optim_args must be KEY=VALUE pairs, separated by commas, got {args.optim_args!r}"
        return
    try:
        made = _class_and_settings(args, args.optim_args)
        if made is None:
            return
        optimizer = made[0]([torch.nn.Parameter(torch.zeros(1))], **made[1])
    except Exception as error:
        given = f", training.optim_args={args.optim_args}" if args.optim_args else ""
        yield f"training.optim={name}{given} cannot be built: {error}"
        return
    for key, _ in pairs:
        if not _reads(args, key):
            yield f"training.optim_args: training.optim={name} does not read {key!r}. Drop it, or choose another optimizer"
    steps, settings = max(args.max_steps, 1), args.lr_scheduler_kwargs or None
    chosen: dict[str, Any] = {"num_warmup_steps": args.get_warmup_steps(steps), "num_training_steps": steps}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, **chosen, scheduler_specific_kwargs=settings)  # type: ignore[arg-type]
    except Exception as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        given = f", training.lr_scheduler_kwargs={settings}" if settings else ""
        yield f"training.lr_scheduler_type={kind}{given} cannot be built: {error}"


def _class_and_settings(args: TrainingArguments, optim_args: str | None) -> tuple[Any, dict[str, Any]] | None:
    """Return Trainer's choice of an optimizer; None if it can only be made for the model itself."""
    from transformers import Trainer

    own = copy.copy(args)
    own.optim_args = optim_args
    try:
        return Trainer.get_optimizer_cls_and_kwargs(own)
    except ValueError as error:
        if "pass a model" in str(error).replace("`", ""):
            return None
        raise


def _reads(args: TrainingArguments, key: str) -> bool:
    """Return True if the optimizer's settings depend on `key` of `optim_args`."""
    try:
        return _class_and_settings(args, f"{key}=0.125") != _class_and_settings(args, f"{key}=1")
    except (ValueError, TypeError, KeyError):
        return True
