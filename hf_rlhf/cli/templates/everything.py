"""Optional members of a plugin of the training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hf_rlhf import Metric
from hf_rlhf.axes import Algorithm, Context, Plugin


class Everything(Plugin):
    """Members that `new --full` adds to a plugin; delete those that yours does not need."""

    metrics = (
        Metric(
            "rollouts_seen",
            "count",
            "rollouts since the start of training, those before a resume included",
        ),
    )

    def __post_init__(self) -> None:
        self._rollouts = 0

    def setup(self, context: Context) -> None:
        """Start what is costly: models, workers, connections."""

    def close(self) -> None:
        """Stop what `setup` started. Called once, also after an error."""

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Count a rollout, before its first update."""
        self._rollouts += 1

    def report(self) -> Mapping[str, float]:
        """Return values of `metrics` to log, equal on every process."""
        return {"rollouts_seen": float(self._rollouts)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint."""
        return {"rollouts": self._rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._rollouts = state["rollouts"]

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield reasons why this plugin cannot run or learn in `algorithm`, each with what to write instead."""
        return ()

    def in_words(self) -> str:
        """Return the plugin in a few words, for the plan's line on the algorithm."""
        return self.name.replace("_", " ")

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield notes for the plan, such as settings that have no effect in `algorithm`."""
        return ()

    def model_remarks(self, config: Any) -> Iterable[str]:
        """Yield notes for the plan on a policy with this configuration, which is read without loading the model."""
        return ()
