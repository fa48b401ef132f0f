"""Undocumented behavior of TRL: its trainers send telemetry to the Hub, round adapters on quantized bases, and forget metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Restore dtype and values of trained parameters after the block.

    TRL's trainers cast trained parameters on a quantized base to bfloat16, whatever the rest of the model is.
    """
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad and _quantised(model)]
    yield
    for p, x in before:
        p.data = x


def _quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def metrics_state(trainer: Any) -> dict[str, Any]:
    """Return what one of TRL's trainers averages in its next entry of the log, and its count of tokens."""
    averaged = {name: [float(x) for x in values] for name, values in _averaged(trainer).items()}
    return {"averaged": averaged, "tokens": getattr(trainer, "_total_train_tokens", 0)}


def load_metrics_state(trainer: Any, state: dict[str, Any]) -> None:
    """Restore the output of `metrics_state`."""
    _averaged(trainer).update(state["averaged"])
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = state["tokens"]


def _averaged(trainer: Any) -> dict[str, Any]:
    metrics = getattr(trainer, "_metrics", None)
    return metrics.get("train", {}) if isinstance(metrics, dict) else {}


class Quiet:
    """Mixin that turns off the telemetry of TRL's trainers, and changes nothing in other trainers."""

    def _send_telemetry(self) -> None:
        """Send nothing; TRL would send the kinds of trainer, model, dataset and device."""
