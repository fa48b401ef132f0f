"""Study of a combination of plugins: the objective of its expected gradient, bias and variance."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import AdvantageEstimator, Plugin
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.lab.expectation import OF_THE_POLICY, Expectation, Gradients, Values, with_inner
from hf_rlhf.lab.objectives import MATCH, Match, Objectives, distance, fraction, nearest, parallel
from hf_rlhf.lab.world import Policies, World

WITNESSES = 2
"""Number of policies, the studied one first, at which an objective must be recognized with one factor."""
STEP = 1e-5
"""Step of the central differences for the Jacobian of the expected gradient."""
DIRECTIONS = 2
"""Number of random directions of the Jacobian; two distinguish a curl from none."""
CURL = 1e-6
"""Asymmetry of the Jacobian below which there is no curl; central differences leave 1e-10."""
KEPT = 200
"""Maximum number of combinations whose gradients are cached."""
STATIONARY = 1e-9
"""Size of the expected gradient at pi*, relative to that of E[r] there, below which pi* is stationary."""
SHARP = 1e-6
"""Size of the gradient of E[r] at pi*, relative to that of the objective, below which pi* is nearly a single completion
and rounding hides whether it is stationary."""
NOTHING = 1e-12
"""Size relative to grad E[r] below which a gradient is 0."""


class Verdict(Enum):
    """Kind of an expected gradient, as one character."""

    GOAL = "="
    """A multiple of grad E[r] - beta grad KL(pi||ref)."""
    OTHER_BETA = "b"
    """A multiple of that with another beta."""
    OTHER = "o"
    """The gradient of another, recognized objective."""
    FIXED = "f"
    """Recognized, but not the gradient of any function: part of it is held fixed."""
    PARALLEL = "c"
    """Parallel to it, by a factor that depends on the policy."""
    UNKNOWN = "?"
    """The gradient of an unrecognized function."""
    NOTHING = "-"
    """Not recognized, and not the gradient of any function."""
    UNDEFINED = " "
    """Could not be computed."""


@dataclass(kw_only=True)
class Row:
    """Results for one combination; None for values that are undefined or could not be computed."""

    advantages: str
    kl: str
    """Placements, joined by ` + `; `none`."""
    estimator: str | None
    level: str | None
    aggregation: str
    objective: str | None = None
    """Recognized objective of the expected gradient; `none` if it is not recognized, `0` if it is zero."""
    relative_error: float | None = None
    """|expected gradient - gradient of the objective| / |expected gradient|, over two policies; for `none` that of the
    nearest candidate."""
    cosine: float | None = None
    """Cosine of the expected gradient and grad E[r] - beta grad KL(pi||ref)."""
    variance: float | None = None
    """Trace of the covariance of a rollout's gradient times its rows, the contribution of one completion."""
    bias: float | None = None
    """|expected gradient - (grad E[r] - beta grad KL)| / |grad E[r] - beta grad KL|."""
    norm: float | None = None
    """Norm of the expected gradient."""
    nearest: str | None = None
    """Recognized objective, or the nearest candidate."""
    reward_part: str | None = None
    """Objective without the KL; `0` if it is zero, None if it is not recognized."""
    reward_factor: float | None = None
    """Factor of `reward_part`."""
    kl_part: str | None = None
    """Objective subtracted by the KL, over beta; `0` and None as for `reward_part`."""
    kl_factor: float | None = None
    """Factor of `kl_part`; divided by `reward_factor` it is that of the effective beta."""
    stationary: bool | None = None
    """True if the expected gradient vanishes at pi* = ref e^{r/beta} / Z."""
    drift: float | None = None
    """Norm of the expected gradient at pi*, relative to that of grad E[r]."""
    is_gradient: bool | None = None
    """True if it is the gradient of some function: its Jacobian is symmetric."""
    asymmetry: float | None = None
    """Largest difference of d_i^T J d_j and d_j^T J d_i for two directions d, J the Jacobian, relative to the largest."""
    refused: list[str] = field(default_factory=list)
    """Reasons for which a trainer would reject the combination."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the estimator that differ from their defaults."""
    recipe: str | None = None
    """Recipe with these choices, in the matrix."""
    policy_loss: str = "reinforce"
    values: str | None = None
    """Values of the critic: exact or arbitrary; None without a critic."""
    rewards: str = "real"
    prompts: int = 1
    group: int = 3
    length: int = 3
    turns: int = 1
    tokens: int = 3
    beta: float | None = None
    off_policy: bool = False

    @property
    def verdict(self) -> Verdict:
        """Kind of the expected gradient."""
        if self.objective is None:
            return Verdict.UNDEFINED
        if self.objective == "none":
            return Verdict.UNKNOWN if self.is_gradient else Verdict.NOTHING
        if self.objective in ("c(pi) E[r]", "c(pi) (E[r] - beta KL(pi||ref))"):
            return Verdict.PARALLEL
        goal = "0" if self.rewards == "none" else "E[r]"
        if (self.reward_part, self.kl_part) == (goal, "0" if self.beta is None else "KL(pi||ref)"):
            any_beta = self.beta is None or self.rewards == "none"
            return Verdict.GOAL if any_beta or self.kl_factor == self.reward_factor else Verdict.OTHER_BETA
        return Verdict.OTHER if self.is_gradient else Verdict.FIXED

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True, eq=False)
class Lab:
    """Study of combinations in one world with one beta; shared results are computed once."""

    world: World
    beta: float | None = None
    """Beta of all studied KLs; None if there are none."""
    values: Values = "exact"
    off_policy: bool = False
    """True if rollouts come from policies other than the updated ones."""
    _advantages: dict[tuple[str, int], Tensor | ValueError] = field(default_factory=dict)
    _policy_parts: dict[str, Gradients] = field(default_factory=dict)
    _kl_parts: dict[str, Gradients] = field(default_factory=dict)

    # Policies: the studied one and the witnesses, pi*, then pairs around the studied one

    @cached_property
    def directions(self) -> Tensor:
        """Directions (DIRECTIONS, S, V) in which the studied policy is moved for the Jacobian."""
        return torch.stack([self.world.table(100 + i) for i in range(DIRECTIONS)])

    @cached_property
    def expectation(self) -> Expectation:
        """Expectations over the rollouts of all policies at once."""
        base = torch.stack([self.world.table(i) for i in range(WITNESSES)])
        moved = [base[0] + sign * STEP * direction for direction in self.directions for sign in (1, -1)]
        tables = torch.cat([base, self.world.optimum(self.beta or 1.0)[None], torch.stack(moved)])
        policies = Policies(self.world, tables)
        return Expectation(
            world=self.world,
            policies=policies,
            sampler=Policies(self.world, self._behind(tables)) if self.off_policy else policies,
            values=self.values,
        )

    def _behind(self, tables: Tensor) -> Tensor:
        """Return the rollout policies: each policy before an update; a single one for those around the studied one."""
        drift = 0.3 * torch.stack([self.world.table(WITNESSES + i) for i in range(WITNESSES + 1)])
        fixed = tables[:1].expand(len(tables) - WITNESSES - 1, -1, -1) + drift[:1]
        return torch.cat([tables[: WITNESSES + 1] + drift, fixed])

    @cached_property
    def objectives(self) -> Objectives:
        """Candidates at the studied policy and the witnesses."""
        e = self.expectation
        now = Policies(self.world, e.policies.tables[:WITNESSES])
        old = Policies(self.world, e.sampler.tables[:WITNESSES]) if self.off_policy else now
        return Objectives(now, e.reference, old)

    @cached_property
    def pull_at_optimum(self) -> Tensor:
        """Norm of grad E[r] at pi*."""
        there = Policies(self.world, self.expectation.policies.tables[WITNESSES : WITNESSES + 1])
        return Objectives(there, self.expectation.reference, there).mean_reward.norm()

    def gradients(self, algorithm: Algorithm) -> Gradients:
        """Return the gradients of a combination at every policy. Raises `ValueError` if the estimator does."""
        before = [kl for kl in algorithm.kl if kl.places & {"reward", "advantage"}]
        loss = [kl for kl in algorithm.kl if "loss" in kl.places]
        found = self._policy_part(dataclasses.replace(algorithm, kl=before))
        return found + self._kl_part(dataclasses.replace(algorithm, kl=loss)) if loss else found

    def _policy_part(self, a: Algorithm) -> Gradients:
        key = repr((a.advantages, a.kl, a.policy_loss, a.aggregation))
        if key not in self._policy_parts:
            while len(self._policy_parts) >= KEPT:
                self._policy_parts.pop(next(iter(self._policy_parts)))
            self._policy_parts[key] = self.expectation.policy_part(a, self.advantages(a))
        return self._policy_parts[key]

    def _kl_part(self, a: Algorithm) -> Gradients:
        key = repr((a.kl, a.aggregation))
        if key not in self._kl_parts:
            self._kl_parts[key] = self.expectation.kl_part(a)
        return self._kl_parts[key]

    def advantages(self, algorithm: Algorithm) -> Tensor:
        """Return advantages (K R N, T) before any KL in the advantage; shared by KLs with the same effect on the reward."""
        penalties = self.expectation.kl_penalties(algorithm)
        key = (repr(algorithm.advantages), hash(penalties.numpy().tobytes()))
        if key not in self._advantages:
            while len(self._advantages) >= KEPT:
                self._advantages.pop(next(iter(self._advantages)))
            try:
                self._advantages[key] = self._of_every_policy(algorithm.advantages, penalties)
            except ValueError as error:
                self._advantages[key] = error
        found = self._advantages[key]
        if isinstance(found, ValueError):
            raise found
        return found

    def _of_every_policy(self, estimator: AdvantageEstimator, penalties: Tensor) -> Tensor:
        """Return advantages for every policy; computed once if the estimator does not depend on the policy."""
        if any(plugin.needs & OF_THE_POLICY for plugin in with_inner(estimator)) or bool(penalties.any()):
            return self.expectation.advantages(estimator, penalties)
        found = self.expectation.of_first.advantages(estimator, penalties[:1])
        return found.repeat(len(penalties), 1)

    # A combination

    def describe(self, algorithm: Algorithm) -> Row:
        """Return a row with the choices and the reasons for rejection, without computing anything."""
        kls = [kl for kl in algorithm.kl if kl.places]
        return Row(
            advantages=algorithm.advantages.name,
            kl=" + ".join(kl.name for kl in kls) or "none",
            estimator=_joined([kl.estimator.name for kl in kls]),
            level=_joined([kl.level for kl in kls]),
            aggregation=algorithm.aggregation.name,
            refused=algorithm.problems(),
            settings=changed_settings(algorithm.advantages),
            policy_loss=algorithm.policy_loss.name,
            values=self.values if "values" in algorithm.needs else None,
            rewards=self.world.rewards,
            prompts=self.world.prompts,
            group=self.world.group,
            length=self.world.length,
            turns=self.world.turns,
            tokens=self.world.tokens,
            beta=self.beta if kls else None,
            off_policy=self.off_policy,
        )

    def study(self, algorithm: Algorithm) -> Row:
        """Study a combination, even a rejected one. `algorithm` must have no filters and no loss terms."""
        row = self.describe(algorithm)
        if any("full_distribution" in kl.estimator.needs and kl.level == "sequence" for kl in algorithm.kl):
            return row  # there is no such estimate
        try:
            gradients = self.gradients(algorithm)
            alone = self.gradients(dataclasses.replace(algorithm, kl=[])) if row.beta is not None else gradients
        except ValueError as error:
            row.refused.append(f"advantages={row.advantages}: {error}")
            return row
        if bool(gradients.mean.isfinite().all()):
            self._measure(row, gradients)
            self._recognise(row, gradients.mean[:WITNESSES], alone.mean[:WITNESSES], algorithm)
        return row

    def _measure(self, row: Row, gradients: Gradients) -> None:
        field, goal = gradients.mean, self.objectives.mean_reward[0] - (row.beta or 0.0) * self.objectives.kl[0]
        norm, wanted = float(field[0].norm()), float(goal.norm())
        row.norm, row.variance = norm, self.expectation.variance(gradients)
        row.bias = float((field[0] - goal).norm()) / wanted
        if norm > NOTHING * wanted:
            row.cosine = float((field[0] * goal).sum()) / norm / wanted
        pull = float(self.pull_at_optimum)
        if row.beta and pull > SHARP * wanted:
            row.drift = float(field[WITNESSES].norm()) / pull
            row.stationary = row.drift < STATIONARY
        forms = self._forms(field)
        largest = float(forms.abs().max())
        row.asymmetry = float((forms - forms.T).abs().max()) / largest if largest > NOTHING * wanted else 0.0
        row.is_gradient = row.asymmetry < CURL

    def _forms(self, field: Tensor) -> Tensor:
        """Return d_i^T J d_j (D, D) for the Jacobian J of the expected gradient at the studied policy."""
        ahead, behind = field[WITNESSES + 1 :: 2], field[WITNESSES + 2 :: 2]
        columns = (ahead - behind).flatten(1) / (2 * STEP)
        return self.directions.flatten(1) @ columns.T

    def _recognise(self, row: Row, field: Tensor, alone: Tensor, algorithm: Algorithm) -> None:
        """Recognize the parts of the reward and of the KL. `alone` is the expected gradient without any KL."""
        small = NOTHING * float(self.objectives.mean_reward.norm())
        reward = self._reward_part(alone, algorithm) if float(alone.norm()) > small else None
        added = field - alone
        kl = None
        if row.beta and float(added.norm()) > small:
            kl = nearest(-added / row.beta, self.objectives.of_kls(algorithm))
        total = torch.zeros_like(field)
        if reward:
            total = total + reward.factor * reward.gradient
        if kl:
            total = total - (row.beta or 0.0) * kl.factor * kl.gradient
        row.reward_part, row.reward_factor = _part(reward)
        row.kl_part, row.kl_factor = _part(kl)
        row.nearest = _text(reward, kl)
        row.relative_error = distance(field, total) if reward or kl else 0.0
        row.objective = row.nearest if row.relative_error < MATCH else "none"
        if row.objective == "none":
            goal = self.objectives.mean_reward - (row.beta or 0.0) * self.objectives.kl
            error = parallel(field, goal)
            if error < MATCH:
                row.objective = row.nearest = "c(pi) (E[r] - beta KL(pi||ref))"
                row.relative_error = error

    def _reward_part(self, field: Tensor, algorithm: Algorithm) -> Match:
        objectives = self.objectives
        match = nearest(field, [*objectives.of_rewards, *objectives.of_turns(algorithm.advantages)])
        if not match.found:
            constant = objectives.of_constant_baseline(field)
            match = constant if constant.found else match
        if not match.found:
            error = parallel(field, objectives.mean_reward)
            match = Match("c(pi) E[r]", 1.0, field, error) if error < MATCH else match
        return match


def changed_settings(plugin: Plugin) -> dict[str, Any]:
    """Return the settings of a plugin that differ from their defaults, with nested plugins by name."""
    changed = {}
    for setting in dataclasses.fields(plugin):
        value = getattr(plugin, setting.name)
        default = setting.default
        if setting.init and value != default and not (isinstance(value, list | dict) and not value):
            changed[setting.name] = _plain(value)
    return changed


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, Plugin):
        more = changed_settings(value)
        return f"{value.name}({', '.join(f'{k}={v}' for k, v in more.items())})" if more else value.name
    return value


def _part(match: Match | None) -> tuple[str | None, float | None]:
    """Return name and factor of a match; `0` for None."""
    if match is None:
        return "0", 0.0
    return (match.name, match.factor) if match.found else (None, None)


def _joined(names: list[str]) -> str | None:
    """Join the names, or return a single one if all are equal."""
    return " + ".join(dict.fromkeys(names)) or None


def _number(x: float) -> str:
    """Format a factor before a name; empty for 1."""
    near = fraction(x)
    return "" if near == 1 else f"{x:.3g} " if near is None else f"{near} "


def _text(reward: Match | None, kl: Match | None) -> str:
    """Format as `2/3 (E[r] - beta KL(pi||ref))`; `0` if both are None."""
    if reward and kl and abs(reward.factor - kl.factor) < 1e-9:
        both = f"{reward.name} - beta {_bracketed(kl.name)}"
        factor = _number(reward.factor)
        return f"{factor}({both})" if factor else both
    text = ""
    if reward:
        factor = _number(reward.factor)
        text = f"{factor}{_bracketed(reward.name) if factor else reward.name}"
    if kl:
        text += f" {'+' if kl.factor < 0 else '-'} {_number(abs(kl.factor))}beta {_bracketed(kl.name)}"
    return text.strip() or "0"


def _bracketed(name: str) -> str:
    """Add brackets to a difference."""
    depth = 0
    for i, character in enumerate(name):
        depth += (character in "([") - (character in ")]")
        if not depth and name[i : i + 3] == " - ":
            return f"({name})"
    return name
