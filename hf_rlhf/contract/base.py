"""Base class of plugins on every axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Interval

from hf_rlhf.batch import Context
from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.metric import Metric
from hf_rlhf.runtime.hub import OnHub

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_rlhf.contract.algorithm_view import Algorithm

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Ge(1)]
HubModel = Annotated[str, OnHub("model")]
HubTokenizer = Annotated[str, OnHub("tokenizer")]
HubDataset = Annotated[str, OnHub("dataset")]


def choice(name: str) -> Any:
    """Declare a nested plugin whose default is the plugin `name` with its default settings."""
    return field(metadata={"use": name})


@dataclass(kw_only=True)
class Plugin:
    """Plugin on one axis."""

    axis: ClassVar[Axis]
    """Set by the base class of each axis."""
    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    metrics: ClassVar[tuple[Metric, ...]] = ()
    """Metrics of the plugin, by names below the prefix of its axis (`Axis.metric_prefix`)."""
    words: ClassVar[str] = ""
    """Phrase for the plan's line on the algorithm; `{beta:g}` stands for the value of the setting `beta`."""

    def in_words(self) -> str:
        """Return `words` with the settings filled in, or the name."""
        return self.words.format_map(vars(self)) if self.words else self.name.replace("_", " ")

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield reasons why this plugin cannot run or learn in `algorithm`, each with what to write instead."""
        return ()

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield notes for the plan, such as settings that have no effect in `algorithm`."""
        return ()

    def model_remarks(self, config: PreTrainedConfig) -> Iterable[str]:
        """Yield notes for the plan on a policy with this configuration, which is read without loading the model."""
        return ()

    def setup(self, context: Context) -> None:
        """Start what is costly: models, workers, connections."""

    def close(self) -> None:
        """Stop what `setup` started. Called once, also after an error."""

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Take the statistics of a whole rollout, equal on every process, once per rollout before its first update.

        Among them: rollout/rows, reward/total/mean, reward/after_kl/mean, kl/rollout/sequence and /token (mean k1 in nats,
        if old and reference log-probs are computed), and policy/*, averaged over the updates since the last rollout.
        """

    def report(self) -> Mapping[str, float]:
        """Return values of `metrics` to log, equal on every process. Called once per rollout, after `observe`.

        Metrics that a policy loss or an estimator returns as tensors are logged without it.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint: numbers, strings, tensors, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def nested_of(plugin: Plugin) -> Iterator[Plugin]:
    """Yield the plugins nested in a plugin, at any depth."""
    for setting in fields(plugin):
        value = getattr(plugin, setting.name)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, Plugin):
                yield child
                yield from nested_of(child)
