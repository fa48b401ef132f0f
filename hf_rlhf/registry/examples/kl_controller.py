"""Raise the KL coefficient from 0 during the first rollouts.

Try it: `hf-rlhf train quickstart 'kl=[{use: in_reward, controller: ramp}]'`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, KLController

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class Ramp(KLController):
    """Rise linearly from 0 to the recipe's beta, and stay there."""

    name = "ramp"

    length: Count = 10
    """Rollouts until beta is the recipe's."""

    def __post_init__(self) -> None:
        self._rollouts = 0

    def __call__(self, beta: float) -> float:
        return beta * min(1.0, self._rollouts / self.length)

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Count a rollout, before its first update."""
        self._rollouts += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint."""
        return {"rollouts": self._rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._rollouts = state["rollouts"]


@hookimpl
def kl_controller() -> list[type[KLController]]:
    return [Ramp]
