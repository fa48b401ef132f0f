"""Overrides that several patterns tell to type."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_rlhf.axes import History

FACTOR = 3.0
"""Ratio of the learning rate to the one that is told to type."""

LOW, HIGH = 0.8, 1.25
"""Mean ratio of the probabilities of two policies that are nearly the same."""


def apart(history: History, distance: str, most: float, ratio: str) -> int | None:
    """Return the step since when two policies have a distance above `most`, or a mean ratio outside `LOW` to `HIGH`."""
    steps = history.since(distance, lambda x: x > most), history.since(ratio, lambda x: not LOW <= x <= HIGH)
    return min((step for step in steps if step is not None), default=None)


def learning_rate(history: History, factor: float) -> tuple[str, ...]:
    """Return the override that multiplies the learning rate; nothing if the run has none."""
    rate = history.learning_rate
    return (f"training.learning_rate={rate * factor:.1e}",) if rate else ()


def lower_learning_rate(history: History) -> tuple[str, ...]:
    """Return the override that lowers the learning rate."""
    return learning_rate(history, 1 / FACTOR)


def one_epoch(history: History) -> tuple[str, ...]:
    """Return the override that updates once on each rollout, if it is updated on more often."""
    return ("update.epochs=1",) if (history.recipe.get("update") or {}).get("epochs", 1) > 1 else ()


def added(history: History, axis: str, plugin: str) -> str:
    """Return the override that adds a plugin to a list of the recipe."""
    return f"{axis}.{history.next_place(axis)}={plugin}"


def dearer_kl(history: History) -> tuple[str, ...]:
    """Return overrides that triple beta where the KL has one, and otherwise lower the learning rate."""
    kls = history.recipe.get("kl") or ()
    betas = [f"kl.{i}.beta={kl['beta'] * FACTOR:.3g}" for i, kl in enumerate(kls) if kl.get("beta")]
    return tuple(betas) or lower_learning_rate(history)
