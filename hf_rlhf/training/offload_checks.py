"""Check `offload` settings against the optimizer and the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hf_rlhf.axes import UpdateRule

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_rlhf.config.algorithm import Algorithm

CODED = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Optimizers of TrainingArguments whose state is torchao's codes, not plain tensors."""


def offload_problems(a: Algorithm, args: TrainingArguments) -> Iterator[str]:
    """Yield why the optimizer's state cannot be offloaded, with what to write instead."""
    optim, asked = optimizer_name(args), [path for path in ("update", "critic") if _offloads(getattr(a, path))]
    if asked and optim in CODED and type(a.optimizer).hold is UpdateRule.hold:
        drop = " and ".join(f"{axis}.offload=false" for axis in asked)
        yield (
            f"offload requires plain tensors, and the state of training.optim={optim} is torchao's codes: set {drop}, or "
            "training.optim=adamw_torch"
        )


def offload_remarks(a: Algorithm, args: TrainingArguments) -> Iterator[str]:
    """Yield a remark for each `offload` that has no effect."""
    asked = [f"{path}.offload" for path, part in [("update", a.update), *a.plugins()] if _offloads(part)]
    if asked and args.device.type == "cpu":
        yield f"{', '.join(asked)}: no effect on a CPU, where everything is in main memory"
    if a.update.offload and a.update.ema is None and _stateless(args) and type(a.optimizer).hold is UpdateRule.hold:
        yield (
            f"update.offload has no effect: training.optim={optimizer_name(args)} without momentum keeps no state, and there "
            "is no update.ema"
        )


def policy_state(a: Algorithm, args: TrainingArguments) -> bool:
    """Return whether an optimizer step leaves state of the policy's parameters behind, as far as is known."""
    return type(a.optimizer).hold is UpdateRule.hold and not _stateless(args)


def optimizer_name(args: TrainingArguments) -> str:
    """Return `training.optim`."""
    return str(getattr(args.optim, "value", args.optim))


def _offloads(part: object) -> bool:
    return bool(getattr(part, "offload", False))


def _stateless(args: TrainingArguments) -> bool:
    pairs = (pair.partition("=") for pair in str(args.optim_args or "").replace(" ", "").split(","))
    momentum = next((value for name, _, value in pairs if name == "momentum"), "0")
    return optimizer_name(args) == "sgd" and float(momentum) == 0
