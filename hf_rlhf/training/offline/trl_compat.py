"""Undocumented behavior of TRL: its trainers send telemetry to the Hub, and round adapters on quantized bases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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


class Quiet:
    """Mixin that turns off the telemetry of TRL's trainers, and changes nothing in other trainers."""

    def _send_telemetry(self) -> None:
        """Send nothing; TRL would send the kinds of trainer, model, dataset and device."""
