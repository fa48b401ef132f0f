"""Plugins that are wrong in one way each, with the fact of the conformance kit that must say so: names, settings, state.

The other modules hold the axes. Where a docstring ends in a public thread, that system had the bug.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
    "exact": "exact log-probs are the policy's",
    "silent": "a row without advantages has no gradient",
    "token": "each token's loss depends on its own numbers alone",
    "documented": "it is a dataclass with a name, and every setting is documented",
    "known": "needs and provides are sets of known names",
    "recipe": "its settings survive a recipe",
    "copies": "it can be copied and pickled",
    "state": "its state survives a checkpoint",
    "resume": "it computes the same after a checkpoint",
    "metric names": "metrics are named below its axis and explained",
    "reports": "reported metrics are declared and finite",
    "returned metrics": "returned metrics are declared and finite",
    "credit metrics": "metrics of its Credit are declared, and are numbers, per row or per token",
    "reward metrics": "logged metrics are declared, finite numbers",
    "step metrics": "metrics of a step are declared, finite numbers",
    "pattern": "its meaning, symptom and rule are phrases, and it has no settings",
    "empty log": "it finds nothing in a run that has logged nothing",
    "first steps": "it finds nothing in the first steps of a run",
    "reads": "it leaves the history as it is, and finds the same in it again",
    "ends": "its episodes end, with an outcome or over",
    "equal seeds": "equal seeds give equal episodes",
    "beside": "an episode does not depend on those that play beside it",
    "no turn": "it ends where the policy has no turn left",
    "no token": "it ends where the policy has no token left",
    "samples": "only the model that it is given samples",
    "columns": "its columns have a plain value for each row",
    "tool": "a wrong call of its tool double does not end an episode",
    "no process": "it leaves no process behind",
    "draws": "it draws as many rows of the dataset as it is asked for",
    "equal draws": "every process draws the same rows",
    "own generator": "random numbers come from the generator that it gets",
    "late": "it observes late, and rows without a score",
    "same draws": "resumed from a checkpoint it draws the same rows",
    "shape": "output has the shape and dtype of its input",
    "needs": "it reads what it declares in needs, and nothing else",
    "mask": "it is 0 off the mask",
    "degenerate": "it is finite on degenerate input",
    "few": "it is finite for a single row, and without rewards",
    "single": "it is finite for groups of one row",
    "equal": "it is finite for equal rewards, and ignores rounding",
    "nan": "it is finite for rewards that do not apply (NaN)",
    "far": "it is finite for a sampler with very different log-probs",
    "labels": "group ids are only labels",
    "prompts": "rows of other prompts change nothing",
    "float32": "float32 gives what float64 gives",
    "padding": "padding columns change nothing",
    "order": "the order of the rows changes nothing",
    "off": "values off the mask change nothing",
    "tools": "a column of tool tokens changes nothing",
    "processes": "the number of processes changes nothing",
    "split": "any split into micro-batches changes nothing",
    "pure": "it is deterministic, and changes neither its input nor a random generator",
    "factors": "its factors are non-negative and carry no gradient",
    "gradient": "its gradient reaches its inputs",
    "differences": "its gradient equals finite differences",
    "climbs": "a positive advantage raises the log-prob",
    "clips": "a clip stops both directions, and only away from the old policy",
    "zero": "equal log-probs give 0",
    "positive": "its mean under the policy is non-negative",
    "elementwise": "each number depends on its own log-probs alone",
    "one": "equal log-probs give 1",
    "places": "it defines a penalty for each of its places",
    "penalty": "more KL is a larger penalty",
    "kl gradient": "the KL in the loss has a gradient",
    "sane": "beta stays finite and non-negative",
    "rises": "more KL never gives a smaller beta",
    "asking": "asking for beta does not change it",
    "answers": "it returns one number, Spans, TokenScores or None per row",
    "rows": "the order of the rows changes no score",
    "alone": "a row alone gets the same score as among others (rowwise)",
    "sent": "a copy in another process gives the same scores",
    "ranks": "the number of processes changes no score",
    "state after": "its state after scoring survives a checkpoint",
    "pure reward": "it is deterministic, and changes neither its rollouts nor a random generator",
    "logs": "logged columns have one value per row",
    "none": "a row without a reference (None) scores None, not 0",
    "answer": "answer() returns text or None",
    "completions": "it returns the requested number of completions per prompt, none empty",
    "model": "it does not change the model",
    "starts": "what it starts is what a call returns",
    "repeats": "equal random states give equal completions",
    "greedy": "greedy completions depend on the prompt alone, and are adjacent",
    "values": "it returns one finite value per sampled token",
    "causal": "a value does not depend on later tokens",
    "neighbours": "other rows and padding change no value",
    "learns": "it learns, and building it does not change the policy",
    "stays": "updates of the policy do not change its log-probs",
    "moves": "it moves towards the policy, and moves nothing else",
    "holds": "its optimizer holds every parameter it is given",
    "steps": "a step updates policy and critic, which stay finite",
    "texts": "texts depend on the step alone, and have at least two tokens",
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


@dataclass
class Positional(Estimator):
    """Takes its setting by position."""

    strength: float = 1.0
    """How much."""


@dataclass
class Bounds:
    """Settings of a plugin below, by position."""

    low: float = 0.0
    """Least."""


@settings
class PositionalGroup(Estimator):
    """Has a group of settings that are taken by position."""

    bounds: Bounds | None = None
    """Bounds."""


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


class Windowed(Estimator):
    """Puts a window of scores into its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"window": deque([1.0], maxlen=3)}


class Rounded(Estimator):
    """Puts a number of another precision into its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"mean": [np.float32(0.1)]}


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
    Mutant(Undecorated, "documented", "not a dataclass"),
    Mutant(Positional, "documented", r"must be keyword-only, got Positional\.strength"),
    Mutant(PositionalGroup, "documented", r"must be keyword-only, got Bounds\.low"),
    Mutant(NameAsSetting, "documented", "name became a setting"),
    Mutant(Nameless, "documented", "'my estimator'"),
    Mutant(Misspelt, "known", "Did you mean 'ref_logps'"),
    Mutant(Doubled, "recipe", "percent 0.1 becomes 0.001"),
    Mutant(UnknownType, "recipe", "Import it outside TYPE_CHECKING"),
    Mutant(lambda: Uncopied(rule="other"), "copies", "after being copied it is"),
    Mutant(Forgetful, "state", "load_state_dict turned"),
    Mutant(Unsafe, "state", "must hold numbers"),
    Mutant(Windowed, "state", r"state_dict\(\)\['window'\] must .* got collections.deque"),
    Mutant(Rounded, "state", r"state_dict\(\)\['mean'\]\[0\] must .* got numpy.float32"),
    Mutant(Expecting, "state", "not measured in every rollout"),
    Mutant(Reset, "state", "observe changes _mean", ("resume",)),
]
