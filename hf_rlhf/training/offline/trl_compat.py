"""What TRL does and does not document: its trainers tell the Hub that they were made, and round adapters on quantised bases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Inside, what is trained may be rounded; behind it has its number format and its numbers again.

    TRL's trainers make what is trained on a quantised base bfloat16, whatever the rest of the model is.
    """
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad and _quantised(model)]
    yield
    for p, x in before:
        p.data = x


def _quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


class Quiet:
    """In front of a trainer of TRL: it tells nobody that it was made. In front of other trainers it changes nothing."""

    def _send_telemetry(self) -> None:
        """TRL would send the kinds of trainer, model, dataset and device."""
