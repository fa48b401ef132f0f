"""Embedded tasks by the names that recipes give them: each is a small model and a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_rlhf.data.addition_task import BUILTIN, addition_dataset, addition_model
from hf_rlhf.data.calculator_task import CALCULATOR, calculator_dataset, calculator_model
from hf_rlhf.data.guessing_task import GUESSING, guessing_dataset, guessing_model
from hf_rlhf.data.nim_task import NIM, nim_dataset, nim_model

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class BuiltinTask:
    """A small model, made and cached on first use, and its training and held-out rows."""

    model: Callable[[], Path]
    rows: Callable[[], tuple[Rows, Rows]]


TASKS = {
    BUILTIN: BuiltinTask(addition_model, addition_dataset),
    CALCULATOR: BuiltinTask(calculator_model, calculator_dataset),
    GUESSING: BuiltinTask(guessing_model, guessing_dataset),
    NIM: BuiltinTask(nim_model, nim_dataset),
}
"""Values of `model.path` and `dataset.path`."""
