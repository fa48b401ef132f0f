"""What every plugin is, whatever its axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Interval

from hf_rlhf.batch import Context
from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.metric import Metric

if TYPE_CHECKING:
    from hf_rlhf.contract.algorithm_view import Algorithm

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Ge(1)]


def choice(name: str) -> Any:
    """A nested plugin that a recipe may leave out: it then gets the plugin `name` with its default settings."""
    return field(metadata={"use": name})


@dataclass(kw_only=True)
class Plugin:
    """A choice on one axis."""

    axis: ClassVar[Axis]
    """Set by the base class of each axis."""
    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    metrics: ClassVar[tuple[Metric, ...]] = ()
    """Its own metrics, by names below the prefix of its axis (`Axis.metric_prefix`)."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Reasons why this plugin cannot run or cannot learn in `algorithm`, each saying what to write instead."""
        return ()

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        """What the plan should say of this plugin in `algorithm`: settings that are read but cannot bind, and the like."""
        return ()

    def setup(self, context: Context) -> None:
        """Start what is costly: models, workers, connections."""

    def close(self) -> None:
        """Stop what `setup` started. Called once, also after an error."""

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Take in the statistics of a whole rollout, equal on every process, once per rollout, before its first update.

        Among them: rollout/rows, reward/total/mean, reward/after_kl/mean, kl/rollout/sequence and /token (mean k1 in nats,
        where old and reference log-probs are there), and policy/*, averaged over the updates since the last rollout.
        """

    def report(self) -> Mapping[str, float]:
        """Numbers of its own to log, equal on every process, by the names that `metrics` declares. Called once per rollout,
        after `observe`. Tensors of metrics that a policy loss or an estimator returns need none of this."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep: numbers, strings, tensors, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
