"""View of an algorithm that a plugin gets in `check`, `remarks` and `build`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol


class Algorithm(Protocol):
    """The chosen plugins of a recipe: one per axis, lists on the axes `environment`, `rewards`, `kl`, `loss_terms` and
    `filters`."""

    sampler: Any
    rollout: Any
    environment: Any
    rewards: Any
    kl: Any
    advantages: Any
    critic: Any
    policy_loss: Any
    rollout_correction: Any
    reference: Any
    optimizer: Any
    aggregation: Any
    loss_terms: Any
    filters: Any
    update: Any
    """The section `update` of the recipe: mini_batches, epochs and the rest."""

    @property
    def needs(self) -> frozenset[str]:
        """Return what any of the plugins needs."""

    @property
    def provides(self) -> frozenset[str]:
        """Return what the core and the plugins provide."""

    @property
    def steps_per_rollout(self) -> int:
        """Return the number of optimizer steps per rollout."""

    def kl_in(self, place: str) -> list[tuple[str, Any]]:
        """Return (name in logs, placement) of the KLs that enter at `place`: reward, loss or advantage."""

    def plugins(self) -> Iterator[tuple[str, Any]]:
        """Yield every plugin with its dotted key in the recipe, nested ones included."""
