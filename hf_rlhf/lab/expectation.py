"""Expected gradients of plugin combinations: a sum over all rollouts of a world, weighted by probability, in float64.

The plugins, the loss (`hf_rlhf.training.losses`) and the placement of the KL in the reward are the trainer's. The lab
provides what a trainer would sample or learn: rollouts, log-probs, values, greedy rewards. All K policies and all R rollouts
go through a plugin in one call if it treats rollouts separately; a plugin that mixes them (a std over the batch, whitening)
gets them one by one. Which of the two holds is determined by a trial.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from hf_rlhf.axes import AdvantageEstimator, Aggregation, KLPlacement, Plugin
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.lab.world import Policies, World
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.training.losses import DISTRIBUTION, at_last_token, measured, policy_terms
from hf_rlhf.training.rollout_buffer import selection

TRIED = 12
"""Number of rollouts in the trial of whether a plugin treats them separately."""

OF_THE_POLICY = frozenset({"values", "greedy", "sum_sq_probs", "old_entropy", "old_logps", "sampler_logps"})
"""Fields of `Scored` that depend on the policy, besides the KL in the rewards; estimators declare them in `needs`."""

Values = Literal["exact", "arbitrary"]


@dataclass(kw_only=True)
class Expectation:
    """Expectations of gradients at K `policies` over the rollouts of the K policies in `sampler`.

    On-policy the two are the same. Tensors of completions are (K, n, T), of rollouts (K, R, N, T).
    """

    world: World
    policies: Policies
    sampler: Policies
    values: Values = "exact"
    """The critic: each policy's exact V of the return after in-reward KL, or arbitrary numbers."""
    proximal: Policies | None = None
    """Policies of the old log-probs, where they are not those of `sampler`: the rollout correction makes up for the rest."""
    _weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = self.sampler.rollout_probability.sum(1)
        assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12), "probabilities must sum to 1"

    @cached_property
    def of_first(self) -> Expectation:
        """The same for the first policy alone."""
        first = [Policies(self.world, x.tables[:1]) for x in (self.policies, self.sampler)]
        return dataclasses.replace(self, policies=first[0], sampler=first[1], _weights=self._weights)

    # Before the update

    def kl_of_completions(self, algorithm: Algorithm, title: str, kl: KLPlacement) -> Tensor:
        """Return a KL as measured at rollout, without gradient: (K, n, T), or (K, n) at level sequence."""
        known = {**self._known(self.sampler), "logps": self._logps(self.sampler)}
        value = measured(
            algorithm,
            title,
            kl,
            self._with_distributions(algorithm, known, self.sampler),
            self._mask,
            MetricAggregator(),
        )
        return value.view(self.sampler.logps.shape[: value.dim() + 1])

    def kl_penalties(self, algorithm: Algorithm) -> Tensor:
        """Return what the KLs in the reward subtract from it, (K, n, T)."""
        taken = torch.zeros_like(self._mask)
        for title, kl in algorithm.kl_in("reward"):
            penalty = kl.reward_penalty(self.kl_of_completions(algorithm, title, kl)).flatten(0, 1)
            taken = taken + (penalty if penalty.dim() == 2 else at_last_token(penalty, self._mask))
        return taken.view(self.sampler.logps.shape)

    def scored(self, penalties: Tensor) -> Scored:
        """Concatenate all K x R rollouts with every field filled: K R N rows, with separate groups for each rollout."""
        world, n = self.world, len(self.world.sequences)
        k = len(self.sampler.tables)
        given = world.token_rewards.expand(k, n, world.width)
        per_row = {
            "mask": world.mask.expand(k, n, world.width),
            "token_rewards": given - penalties,
            "kl_penalties": penalties,
            "values": self._values(given - penalties),
            "old_logps": self.sampler.logps,
            "sampler_logps": self.sampler.logps,
            "ref_logps": self.reference.logps.expand(k, n, world.width),
            "old_entropy": self.sampler.of_states(self.sampler.entropy()),
            "sum_sq_probs": self.sampler.of_states((2 * self.sampler.log_probs).exp().sum(2)),
            "greedy": self.sampler.greedy,
            "finished": world.finished.expand(k, n),
            "completion_ids": world.token.expand(k, n, world.width),
            "turns": world.turn.expand(k, n, world.width),
            "states": world.anchor.expand(k, n, world.width),
        }
        fields = {name: self._of_rows(x.detach()) for name, x in per_row.items()}
        rollouts = k * len(world.rollouts[0])
        apart = world.prompts * torch.arange(rollouts).repeat_interleave(len(world.group_ids))
        return Scored(
            group_ids=world.group_ids.repeat(rollouts) + apart,
            scores={label: self._of_rows(x.expand(k, n)) for label, x in world.scores.items()},
            weights=world.weights,
            **fields,
        )

    def advantages(self, estimator: AdvantageEstimator, penalties: Tensor) -> Tensor:
        """Return the estimator's advantages (K R N, T) for every rollout, before any KL in the advantage.

        Its plugins have observed the expectations under the first policy, as after many rollouts.
        """
        estimator = self._after_many_rollouts(estimator, penalties)

        def call(scored: Scored) -> Tensor:
            credit = estimator(scored)
            return Credit.of(credit).advantages

        return self._of_each_rollout(call, self.scored(penalties))

    def _after_many_rollouts(self, estimator: AdvantageEstimator, penalties: Tensor) -> AdvantageEstimator:
        estimator = copy.deepcopy(estimator)
        log_ratio = self.sampler.logps - self.reference.logps

        def first(x: Tensor) -> float:
            return float(self.sampler.mean(x)[0])

        known = {
            "rollout/rows": float(len(self.world.group_ids)),
            "reward/total/mean": first(self.world.reward),
            "reward/after_kl/mean": first(self.world.reward - penalties.sum(2)),
            "kl/rollout/sequence": first(log_ratio.sum(2)),
            "kl/rollout/token": first(log_ratio.sum(2)) / first(self.world.lengths),
        }
        for plugin in with_inner(estimator):
            plugin.observe(known)
        return estimator

    def _of_each_rollout(self, function: Callable[[Scored], Tensor], whole: Scored) -> Tensor:
        """Apply `function` to each rollout separately and concatenate the results."""
        size = len(self.world.group_ids)
        together = function(whole)
        rollouts = len(whole.mask) // size
        apart = True
        for i in range(0, rollouts, max(1, rollouts // TRIED)):
            mine = torch.arange(i * size, (i + 1) * size)
            alone, turned = function(_rows(whole, mine)), function(_rows(whole, mine.flip(0)))
            if not torch.allclose(turned.flip(0), alone, rtol=1e-9, atol=1e-9, equal_nan=True):
                raise ValueError("a row's advantage must not depend on its position, except through group_ids")
            apart = apart and torch.allclose(alone, together[mine], rtol=1e-12, atol=1e-13, equal_nan=True)
        if apart:
            return together
        parts = _Parts(whole, size)
        return torch.cat([function(parts[i]) for i in range(rollouts)])

    def _values(self, token_rewards: Tensor) -> Tensor:
        """Return the critic's value of the state of each token, (K, n, T)."""
        if self.values == "arbitrary":
            return self.sampler.of_states(self.world.arbitrary_values.expand(len(self.sampler.tables), -1))
        world, on = self.world, self.world.mask > 0
        to_go = token_rewards.flip(2).cumsum(2).flip(2)
        p = self.sampler.probability.detach()[:, :, None].expand_as(to_go)
        zero = p.new_zeros(len(p), len(world.states))
        reached = zero.index_add(1, world.state[on], p[:, on])
        return self.sampler.of_states(zero.index_add(1, world.state[on], (p * to_go)[:, on]) / reached)

    # The update

    def weights(self, aggregation: Aggregation) -> Tensor:
        """Return the weight of each token (R, N, T), with one optimizer step per rollout."""
        key = repr(aggregation)
        if key not in self._weights:
            world, (rows, _) = self.world, self.world.rollouts
            available = {"group_ids": lambda _: world.group_ids, "total_score": lambda row: world.reward[row]}
            made = []
            for row in rows:
                extras = {name: available[name](row) for name in sorted(aggregation.needs) if name in available}
                made.append(aggregation(world.mask[row], **extras))
            self._weights[key] = torch.stack(made)
        return self._weights[key]

    def policy_part(self, algorithm: Algorithm, advantages: Tensor) -> Gradients:
        """Return the ascent direction of the policy loss in the logits, including KLs in the reward and the advantage.

        `advantages` are those of `advantages(algorithm)`.
        """
        for title, kl in algorithm.kl_in("advantage"):
            penalty = self._of_rows(kl.advantage_penalty(self.kl_of_completions(algorithm, title, kl)))
            on = self._of_rows(self.world.mask.expand_as(self.sampler.logps))
            advantages = advantages - (penalty if penalty.dim() == 2 else penalty[:, None]) * on
        return self._gradients(algorithm, advantages, "policy/")

    def kl_part(self, algorithm: Algorithm) -> Gradients:
        """Return the ascent direction of the KLs in the loss, which does not depend on advantages."""
        k, (rollouts, _) = len(self.policies.tables), self.world.rollouts
        nothing = self.world.mask.new_zeros(k * rollouts.numel(), self.world.width)
        return self._gradients(algorithm, nothing, "kl/")

    def _gradients(self, algorithm: Algorithm, advantages: Tensor, terms: str) -> Gradients:
        k, (rollouts, _) = len(self.policies.tables), self.world.rollouts
        inputs = self._inputs(algorithm, advantages)
        weights = self.weights(algorithm.aggregation)
        probability = self.sampler.rollout_probability.detach()
        expected = (weights * probability[:, :, None, None]).flatten(0, 2)
        mean = self._ascent(algorithm, self.policies.tables, rollouts.flatten().repeat(k), inputs, expected, terms)
        first = {name: x[: rollouts.numel()] for name, x in inputs.items()}
        tables = self.policies.tables[:1].expand(len(rollouts), -1, -1)
        each = self._ascent(algorithm, tables, rollouts.flatten(), first, weights.flatten(0, 1), terms)
        return Gradients(mean=mean, each=each)

    def variance(self, gradients: Gradients) -> float:
        """Return the first policy's variance per completion: the trace of a rollout gradient's covariance times its rows."""
        deviation = (gradients.each - gradients.mean[0]).flatten(1).square().sum(1)
        probability = self.sampler.rollout_probability[0].detach()
        return len(self.world.group_ids) * float((probability * deviation).sum())

    def _inputs(self, algorithm: Algorithm, advantages: Tensor) -> dict[str, Tensor]:
        """Return the loss's inputs besides the policy, (K R N, ...), as in a micro-batch."""
        k, n = len(self.sampler.tables), len(self.world.sequences)
        per_row = {name: x.view(k, n, *x.shape[1:]) for name, x in self._known(self.sampler).items()}
        inputs = {name: self._of_rows(x) for name, x in per_row.items()} | {"advantages": advantages}
        if self.proximal is not None:
            inputs["old_logps"] = self._of_rows(self.proximal.logps.detach())
            mask = self._of_rows(self.world.mask.expand_as(self.sampler.logps))
            correction = algorithm.rollout_correction
            inputs["correction"] = correction(inputs["old_logps"], inputs["sampler_logps"], mask)
        if "selected" in algorithm.policy_loss.needs:

            def select(scored: Scored) -> Tensor:
                return selection(algorithm.policy_loss, vars(scored))

            scored = self.scored(torch.zeros_like(self.sampler.logps))
            inputs["selected"] = self._of_each_rollout(select, dataclasses.replace(scored, advantages=advantages))
        return inputs

    def _ascent(
        self,
        algorithm: Algorithm,
        tables: Tensor,
        rows: Tensor,
        inputs: dict[str, Tensor],
        weights: Tensor,
        terms: str,
    ) -> Tensor:
        """Return the negative gradient (L, S, V) of the loss's `terms` in each of L `tables`, which own equal shares of
        the completions `rows`."""
        leaf = tables.detach().clone().requires_grad_()
        now = Policies(self.world, leaf)
        owner = torch.arange(len(leaf)).repeat_interleave(len(rows) // len(leaf))
        mask = self.world.mask[rows]
        new = {
            "logps": now.log_probs[owner[:, None], self.world.state[rows], self.world.token[rows]] * mask,
            "entropy": self._states(now.entropy(), owner, rows),
        }
        for title, kl in _over_distributions(algorithm):
            new[f"{DISTRIBUTION}{title}"] = self._states(self._distance(kl, now.log_probs), owner, rows)
        found = policy_terms(algorithm, new, {**inputs, "mask": mask, "weights": weights}, MetricAggregator())
        chosen = [x for name, x in found.items() if name.startswith(terms)]
        (gradient,) = torch.autograd.grad(sum(chosen, start=0.0 * leaf.sum()), leaf)
        return -gradient

    # Data of completions and rows

    @cached_property
    def reference(self) -> Policies:
        """The reference as one policy."""
        return Policies(self.world, self.world.reference[None])

    @cached_property
    def _mask(self) -> Tensor:
        """Mask (K n, T)."""
        return self.world.mask.repeat(len(self.sampler.tables), 1)

    def _logps(self, policies: Policies) -> Tensor:
        return policies.logps.detach().flatten(0, 1)

    def _known(self, sampler: Policies) -> dict[str, Tensor]:
        """Return the data (K n, ...) of each completion before the update."""
        k, world = len(sampler.tables), self.world
        return {
            "old_logps": self._logps(sampler),
            "sampler_logps": self._logps(sampler),
            "ref_logps": self._logps(self.reference).repeat(k, 1),
            "old_entropy": sampler.of_states(sampler.entropy()).detach().flatten(0, 1),
            "sum_sq_probs": sampler.of_states((2 * sampler.log_probs).exp().sum(2)).detach().flatten(0, 1),
            "completion_ids": world.token.repeat(k, 1),
            "total_score": world.reward.repeat(k),
            "group_ids": world.prompt.repeat(k),
        }

    def _with_distributions(
        self, algorithm: Algorithm, known: dict[str, Tensor], policies: Policies
    ) -> dict[str, Tensor]:
        made = {
            f"{DISTRIBUTION}{title}": policies.of_states(self._distance(kl, policies.log_probs)).detach().flatten(0, 1)
            for title, kl in _over_distributions(algorithm)
        }
        return known | made

    def _distance(self, kl: KLPlacement, log_probs: Tensor) -> Tensor:
        """Apply an estimator over full distributions in each state: (L, S, V) -> (L, S)."""
        reference = self.reference.log_probs.expand_as(log_probs).flatten(0, 1)
        estimator: Callable[..., Tensor] = kl.estimator
        return estimator(log_probs.flatten(0, 1), reference).view(log_probs.shape[:2])

    def _states(self, x: Tensor, owner: Tensor, rows: Tensor) -> Tensor:
        """Look up values (L, S) at the state of each token: (rows, T)."""
        return x[owner[:, None], self.world.state[rows]] * self.world.mask[rows]

    def _of_rows(self, x: Tensor) -> Tensor:
        """Expand data of completions (K, n, ...) to the rows of every rollout, (K R N, ...)."""
        return x[:, self.world.rollouts[0].flatten()].flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Expected gradient at each policy, `mean` (K, S, V), and the first policy's per rollout, `each` (R, S, V)."""

    mean: Tensor
    each: Tensor

    def __add__(self, other: Gradients) -> Gradients:
        return Gradients(mean=self.mean + other.mean, each=self.each + other.each)


def _rows(whole: Scored, rows: Tensor) -> Scored:
    """Select rows."""
    held = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    cut: dict[str, Any] = {name: x[rows] for name, x in held.items() if isinstance(x, Tensor)}
    scores = {label: x[rows] for label, x in (whole.scores or {}).items()}
    return Scored(**cut, scores=scores, weights=whole.weights)


class _Parts:
    """A `Scored` of many rollouts of `size` rows, split into single ones at once, which is faster than one by one."""

    def __init__(self, whole: Scored, size: int):
        held = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
        self._wide = {name: x.split(size) for name, x in held.items() if isinstance(x, Tensor)}
        self._scores = {label: x.split(size) for label, x in (whole.scores or {}).items()}
        self._weights = whole.weights

    def __getitem__(self, i: int) -> Scored:
        fields: dict[str, Any] = {name: parts[i] for name, parts in self._wide.items()}
        scores = {label: parts[i] for label, parts in self._scores.items()}
        return Scored(**fields, scores=scores, weights=self._weights)


def with_inner(plugin: Any) -> list[Any]:
    """Return a plugin and all plugins nested in it, recursively."""
    found = [plugin]
    for setting in dataclasses.fields(plugin):
        value = getattr(plugin, setting.name)
        for child in value if isinstance(value, list) else [value]:
            found += with_inner(child) if isinstance(child, Plugin) else []
    return found


def _over_distributions(algorithm: Algorithm) -> list[tuple[str, KLPlacement]]:
    return [(title, kl) for title, kl in algorithm.titled("kl") if "full_distribution" in kl.estimator.needs]
