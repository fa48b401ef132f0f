"""Plugins that are wrong in one way each, with the fact of the conformance kit that must say so: names, settings, state.

The other modules hold the axes. Where a docstring ends in a public thread, that system had the bug.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_rlhf.axes import AdvantageEstimator
from hf_rlhf.batch import Credit, Scored

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass(frozen=True)
class Mutant:
    """How to make a plugin that is wrong, the fact that catches it, and what that says (a regular expression)."""

    make: Callable[[], Any]
    fact: str
    says: str
    also: tuple[str, ...] = ()
    """Other facts that the bug makes false as well. No further one may fail."""


FACTS = {
    "exact": "log-probs that it calls exact are the policy's",
    "silent": "a row without advantages has no gradient",
    "token": "each token's loss depends on its own numbers alone",
    "documented": "it is a dataclass with a name, and every setting is documented",
    "known": "what it needs and provides are sets of known names",
    "recipe": "its settings survive a recipe",
    "copies": "it can be copied and pickled",
    "state": "its state survives a checkpoint",
    "resume": "after a checkpoint it computes the same",
    "metric names": "its metrics have names below its axis and say what they measure",
    "reports": "what it reports is declared and finite",
    "returned metrics": "the metrics that it returns are declared and finite",
    "credit metrics": "the metrics of its Credit are declared, a number or one per row or token",
    "reward metrics": "the metrics that it logs are declared, each a finite number",
    "step metrics": "what it logs of a step is declared, each a finite number",
    "shape": "shape and dtype follow its input",
    "needs": "it runs on what it declares, and reads nothing else",
    "mask": "it is 0 off the mask",
    "degenerate": "it is finite on degenerate input",
    "few": "it is finite for a single row, and without rewards",
    "single": "it is finite where a group has one row (K = 1)",
    "equal": "it is finite for equal rewards, and rounding is no signal",
    "nan": "it is finite where a reward does not apply (NaN)",
    "far": "it is finite where the sampler's log-probs are far off",
    "labels": "group ids are only labels",
    "prompts": "rows of other prompts change nothing",
    "float32": "float32 gives what float64 gives",
    "padding": "padding columns change nothing",
    "order": "the order of the rows changes nothing",
    "off": "what stands off the mask changes nothing",
    "tools": "a column of tool tokens changes nothing",
    "processes": "the number of processes changes nothing",
    "split": "any split into micro-batches changes nothing",
    "pure": "it changes neither its input nor a random generator, and repeats itself",
    "factors": "its factors are not negative and carry no gradient",
    "gradient": "its gradient reaches what it is computed from",
    "differences": "its gradient is that of its value (finite differences)",
    "climbs": "a positive advantage raises the log-prob",
    "zero": "equal log-probs give 0",
    "positive": "its mean under the policy is not negative",
    "elementwise": "each number depends on its own log-probs alone",
    "one": "equal log-probs give 1",
    "places": "it defines the penalty of each of its places",
    "penalty": "more KL is a larger penalty",
    "kl gradient": "the KL in the loss has a gradient",
    "sane": "beta stays finite and not negative, whatever was measured",
    "rises": "more KL never gives a smaller beta",
    "asking": "asking for beta does not change it",
    "answers": "it gives one number, Spans, TokenScores or None per row",
    "rows": "the order of the rows changes no score",
    "alone": "a row alone gets the score that it has among others, as rowwise says",
    "sent": "a copy of it in a process of its own scores the same",
    "ranks": "the number of processes changes no score",
    "pure reward": "it changes neither its rollouts nor a random generator, and repeats itself",
    "logs": "what it logs has one value per row",
    "none": "where the dataset has no reference (None) it gives None, not 0",
    "answer": "its final answer is text or None",
    "completions": "it gives as many completions per prompt as it is asked for, none empty",
    "model": "it leaves the model as it was",
    "repeats": "equal random states give equal completions",
    "greedy": "greedy completions depend on the prompt alone, and stand side by side",
    "values": "it gives one finite value per sampled token",
    "causal": "a value does not see what comes after its state",
    "neighbours": "neighbours and padding change no value",
    "learns": "it learns, and building it leaves the policy as it was",
    "stays": "the policy's updates leave its log-probs as they are",
    "moves": "it moves towards the policy, and moves nothing else",
    "holds": "its optimizer holds every parameter it is given",
    "steps": "a step moves policy and critic, and leaves them finite",
    "texts": "its texts depend on the step alone, and have two tokens or more",
}
"""Short name -> what `str` of the fact says after the plugin's name."""


def settings(cls: type) -> Any:
    return dataclass(kw_only=True)(cls)


# Names, settings, state


class Estimator(AdvantageEstimator):
    """A right estimator, to be made wrong."""

    name = "wrong"

    def __call__(self, scored: Scored) -> Tensor | Credit:
        return scored.returns()[:, None] * scored.mask


@settings
class Undocumented(Estimator):
    """Has a setting that nobody explains."""

    strength: float = 1.0


class Undecorated(Estimator):
    """Forgets the decorator."""

    strength: float = 1.0
    """How much."""


@settings
class NameAsSetting(Estimator):
    """Makes its name a setting."""

    name: str = "oops"  # type: ignore[misc]
    """Oops."""


class Nameless(Estimator):
    """Has a name that no recipe can say."""

    name = "my estimator"


class Misspelt(Estimator):
    """Needs what nobody provides."""

    needs = frozenset({"ref_logp"})


@settings
class Doubled(Estimator):
    """Converts its setting each time it is made."""

    percent: float = 10.0
    """A share, in per cent."""

    def __post_init__(self) -> None:
        self.percent = self.percent / 100


@settings
class UnknownType(Estimator):
    """Has a setting whose type exists for type checkers only."""

    scale: Decimal | None = None
    """A factor."""


@settings
class Uncopied(Estimator):
    """Loses its settings in copies."""

    rule: Any = None
    """A rule."""

    def __reduce__(self) -> Any:
        return (type(self), ())


@settings
class Forgetful(Estimator):
    """Saves a count and does not take it back."""

    def __post_init__(self) -> None:
        self._count = torch.rand(1).item()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def __deepcopy__(self, memo: dict[int, Any]) -> Forgetful:
        return type(self)()


class Unsafe(Estimator):
    """Puts an object into its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("/")}


class Expecting(Estimator):
    """Expects a statistic that the first rollout does not have."""

    def observe(self, statistics: Mapping[str, float]) -> None:
        statistics["policy/entropy"]


@settings
class Reset(Estimator):
    """Follows the mean return and starts anew after a checkpoint: state that is not saved (ray-project/ray#22444)."""

    def __post_init__(self) -> None:
        self._mean = 0.0

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._mean = 0.9 * self._mean + 0.1 * statistics["reward/total/mean"]

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.returns() - self._mean)[:, None] * scored.mask


MUTANTS = [
    Mutant(Undocumented, "documented", "without a docstring below them: strength"),
    Mutant(Undecorated, "documented", "no dataclass"),
    Mutant(NameAsSetting, "documented", "name became a setting"),
    Mutant(Nameless, "documented", "'my estimator'"),
    Mutant(Misspelt, "known", "Did you mean 'ref_logps'"),
    Mutant(Doubled, "recipe", "percent 0.1 becomes 0.001"),
    Mutant(UnknownType, "recipe", "import it outside TYPE_CHECKING"),
    Mutant(lambda: Uncopied(rule="other"), "copies", "copied, it is"),
    Mutant(Forgetful, "state", "load_state_dict turned"),
    Mutant(Unsafe, "state", "more than numbers"),
    Mutant(Expecting, "state", "not measured of every rollout"),
    Mutant(Reset, "state", "observe changes _mean", ("resume",)),
]
