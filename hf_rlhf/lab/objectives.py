"""Candidate objectives of an expected gradient, and their recognition.

Each candidate is an expectation over every completion, differentiated by autograd, except for parts that its name declares
fixed. A match must hold at several policies with one factor, so that no candidate fits by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from hf_rlhf.axes import AdvantageEstimator, KLPlacement
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.lab.world import Policies, World

MATCH = 1e-9
"""Relative error below which a gradient is recognized; matches are near 1e-15."""


@dataclass(frozen=True)
class Candidate:
    """Named objective with its gradient (K, S, V) at each policy."""

    name: str
    gradient: Tensor


@dataclass(frozen=True)
class Match:
    """Nearest candidate: `factor` x its gradient, and the error relative to the gradient to match."""

    name: str
    factor: float
    gradient: Tensor
    error: float

    @property
    def found(self) -> bool:
        """True if the gradients are the same."""
        return self.error < MATCH


class Objectives:
    """Candidates of one world at K policies; `reference` is one policy, `sampler` the rollout policies."""

    def __init__(self, policies: Policies, reference: Policies, sampler: Policies):
        self.off_policy = sampler is not policies
        self.world: World = policies.world
        self.leaf = policies.tables.detach().clone().requires_grad_()
        self.now = Policies(self.world, self.leaf)
        self.log_ratio = self.now.logps - reference.logps
        """Log-ratio l of each token, (K, n, T)."""
        self._ref, self._sampler = reference, sampler
        self._halves: dict[str, list[Candidate]] = {}
        self.mean_reward = self.gradient(self.now.mean(self.world.reward))
        self.kl = self.gradient(self.now.mean(self.log_ratio.sum(2)))

    def gradient(self, objective: Tensor) -> Tensor:
        """Differentiate an objective (K,) in the logits: (K, S, V)."""
        return torch.autograd.grad(objective.sum(), self.leaf, retain_graph=True)[0].detach()

    # Rewards

    @cached_property
    def of_rewards(self) -> list[Candidate]:
        """Objectives without a KL."""
        found = [Candidate("E[r]", self.mean_reward)]
        return found + [Candidate(name, self.gradient(x)) for name, x in self._of_rewards()]

    def _of_rewards(self) -> Iterator[tuple[str, Tensor]]:
        now, r, lengths = self.now, self.world.reward, self.world.lengths
        yield "E[r/T]", now.mean(r / lengths)
        mean = now.mean(r).detach()[:, None]
        yield "E[(r - sg E[r])/T]", now.mean((r - mean) / lengths)
        yield "E[(r - sg r(greedy))/T]", now.mean((r - now.greedy) / lengths)
        if self.world.group > 1:
            yield f"E[max of {self.world.group}]", self._of_groups(lambda r, t: r.amax(2))
            mean = self._of_groups(lambda r, t: (t * r).sum(2) / t.sum(2))
            yield f"E[r] - 1/{self.world.group} E[sum T r / sum T]", now.mean(r) - mean / self.world.group
        if self.world.rewards == "binary":
            for order in range(2, self.world.group + 1):
                yield f"-sum_(k <= {order}) (1 - E[r])^k / k", self._log_of_success(order)

    def of_turns(self, estimator: AdvantageEstimator) -> Iterator[Candidate]:
        """Yield the policy gradients of the rewards from each turn on, less their mean over the group's rows with that turn, or
        those in the turn's state beside the whole reward, by the discount and weight of `estimator`. Both hold shares fixed."""
        if self.world.turns == 1:
            return
        number, group = self.world.turn, self.world.group
        yield Candidate("grad of R_k - mean of group's R_k, turn by turn", self._from_groups(number, number, 1.0))
        gamma, weight = getattr(estimator, "gamma", None), getattr(estimator, "step_weight", None)
        if gamma is not None and weight is not None:
            whole = (1 - 1 / group) * self.mean_reward
            name = f"grad of r - mean of group's r + {weight:g} (R_k - mean of state's R_k), gamma {gamma:g}"
            yield Candidate(name, whole + weight * self._from_groups(number, self.world.anchor, gamma))

    def _from_groups(self, turn: Tensor, kind: Tensor, gamma: float) -> Tensor:
        """Return sum_k E[(R_k - mean) grad log pi(turn k)], the mean over the group's turns of the same `kind` (n, T).

        A row is compared with itself, too: a kind that a share q of episodes has counts 1 - (1 - (1 - q)^G) / (G q) times.
        """
        p, size, parts = self.now.probability, self.world.group, torch.zeros(len(self.now.probability))
        for own in [kind == k for k in kind.unique().tolist() if k >= 0]:
            after = (turn - turn.masked_fill(~own, -1).amax(1, keepdim=True)).clamp(min=0)
            later = torch.stack([own[:, : t + 1].any(1) for t in range(own.size(1))], 1)
            to_go = (self.world.token_rewards * gamma ** after.double() * later).sum(1)
            shares = [x.sum(1, keepdim=True).expand_as(x) for x in self._of_prompt((p * own.any(1)).detach())]
            q = torch.cat(shares, 1)
            factor = (1 - (1 - (1 - q) ** size) / (size * q)).nan_to_num()
            parts = parts + (p.detach() * factor * to_go * (self.now.logps * own).sum(2)).sum(1)
        return self.gradient(parts / self.world.prompts)

    def _of_prompt(self, x: Tensor) -> Iterator[Tensor]:
        """Split (K, n) into (K, n / P) for each prompt."""
        yield from x.split(len(self.world.sequences) // self.world.prompts, 1)

    def _of_groups(self, statistic: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the expectation (K,), over prompts and groups, of a statistic of the group's rewards and lengths, which
        maps (K, M, G) to (K, M)."""
        groups, orders = self.world.groups
        of_rows = (
            self.now.probability,
            *(x.expand_as(self.now.probability) for x in (self.world.reward, self.world.lengths)),
        )
        each = zip(*map(self._of_prompt, of_rows), strict=True)
        means = [(p[:, groups].prod(2) * orders * statistic(r[:, groups], t[:, groups])).sum(1) for p, r, t in each]
        return torch.stack(means).mean(0)

    def _log_of_success(self, order: int) -> Tensor:
        failure = [1 - p.sum(1) for p in self._of_prompt(self.now.probability * self.world.reward)]
        return torch.stack([-sum((f**k / k for k in range(1, order + 1)), start=0 * f) for f in failure]).mean(0)

    def of_constant_baseline(self, field: Tensor) -> Match:
        """Return the nearest a E[(r - b)/T], for a constant baseline b."""
        each = [self.gradient(self.now.mean(x / self.world.lengths)) for x in (self.world.reward, torch.ones(()))]
        parts = torch.stack(each).flatten(1).T
        a, c = torch.linalg.lstsq(parts, field.flatten()[:, None]).solution[:, 0].tolist()
        factor = snapped(a)
        baseline = -c / factor if factor else 0.0
        gradient = each[0] - baseline * each[1]
        return Match(f"E[(r - {baseline:.4g})/T]", factor, gradient, distance(field, factor * gradient))

    # KLs

    def of_kls(self, algorithm: Algorithm) -> list[Candidate]:
        """Return divergences, and the halves of the gradient of each KL of `algorithm`."""
        found = list(self.divergences)
        for _, placement in algorithm.titled("kl"):
            key = f"{placement.estimator!r} {placement.level} {placement.clamp}"
            if placement.places and key not in self._halves:
                self._halves[key] = list(self._halves_of(placement))
            found += self._halves.get(key, ())
        return found

    @cached_property
    def divergences(self) -> list[Candidate]:
        """Divergences between the policy and the reference, and differences of two, whatever the algorithm."""
        kl, divergences = self.kl, dict(self._divergences())
        reverse, forward = divergences["per-state KL(pi||ref)"], divergences["per-state KL(ref||pi)"]
        named = {
            "KL(pi||ref)": kl,
            **divergences,
            "KL(pi||ref) - KL(ref||pi)": kl - divergences["KL(ref||pi)"],
            "KL(pi||ref) - per-state KL(ref||pi)": kl - forward,
            "KL(pi||ref) - per-state KL(pi||ref)": kl - reverse,
            "per-state KL(pi||ref) - per-state KL(ref||pi)": reverse - forward,
        }
        return [Candidate(name, gradient) for name, gradient in named.items()]

    def _divergences(self) -> Iterator[tuple[str, Tensor]]:
        now, ref = self.now, self._ref
        yield "KL(ref||pi)", self.gradient(-(ref.probability * self.log_ratio.sum(2)).sum(1) / self.world.prompts)
        yield "L1(pi, ref)", self.gradient((now.probability - ref.probability).abs().sum(1) / self.world.prompts)
        p, q = now.log_probs, ref.log_probs
        of_state: dict[str, Callable[[], Tensor]] = {
            "KL(pi||ref)": lambda: p.exp() * (p - q),
            "KL(ref||pi)": lambda: q.exp() * (q - p),
            "L1(pi, ref)": lambda: (p.exp() - q.exp()).abs(),
        }
        for name, terms in of_state.items():
            yield from self._per_state(name, now.of_states(terms().sum(2)))
        if self.off_policy:
            behind = (self._sampler.probability.detach() * -now.logps.sum(2)).sum(1) / self.world.prompts
            yield "KL(old||pi)", self.gradient(behind)
        log_ratio, lengths = self.log_ratio.sum(2), self.world.lengths
        mean = now.mean(log_ratio).detach()[:, None]
        yield "E[1/T]", self.gradient(now.mean(1 / lengths))
        yield "E[(l - 1)/T]", self.gradient(now.mean((log_ratio - 1) / lengths))
        yield "E[(l - 1 - sg E[l])/T]", self.gradient(now.mean((log_ratio - 1 - mean) / lengths))

    def _per_state(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the sum and the mean over each completion's states of `value` (K, n, T), with the visits held fixed."""
        visits = self._sampler.probability.detach() / self.world.prompts
        for weight, mark in ((torch.ones(()), ""), (1 / self.world.lengths, " / T")):
            yield f"per-state {name}{mark}", self.gradient((visits * value.sum(2) * weight).sum(1))

    def _halves_of(self, placement: KLPlacement) -> Iterator[Candidate]:
        """Yield the halves of grad E[sum e]: the score half (e held fixed), the path half (the probability held fixed),
        and the own-token half, in which each token's e multiplies only the score of that token. If e stops gradients or
        contains a ratio, the halves do not add up to the gradient of its mean."""
        value, name = self._estimate(placement), placement.estimator.name
        if "full_distribution" in placement.estimator.needs:  # no token is sampled in it
            name = placement.estimator.in_words()
            yield from (Candidate(*found) for found in self._per_state(name, value))
        by_token = value.dim() == 3
        total = value.sum(2) if by_token else value
        p, n = self.now.probability, self.world.prompts
        for weight, mark in ((torch.ones(()), ""), (1 / self.world.lengths, " / T")):
            what = f"E[sum {name}{mark}]" if by_token else f"E[{name} of the sequence{mark}]"
            score = self.gradient((p * total.detach() * weight).sum(1) / n)
            path = self.gradient((p.detach() * total * weight).sum(1) / n)
            moved = bool(placement.estimator.stops_gradient or "old_logps" in placement.estimator.needs)
            yield Candidate(f"both halves of {what}" if moved else what, score + path)
            yield Candidate(f"score half of {what}", score)
            yield Candidate(f"path half of {what}", path)
            if by_token:
                own = (value.detach() * self.now.logps).sum(2) * weight
                yield Candidate(f"own-token half of {what}", self.gradient((p.detach() * own).sum(1) / n))

    def _estimate(self, placement: KLPlacement) -> Tensor:
        """Return the estimate with its gradient: (K, n, T), or (K, n) at level sequence."""
        k, n = self.now.probability.shape
        if "full_distribution" in placement.estimator.needs:
            ref = self._ref.log_probs.expand_as(self.now.log_probs)
            of_state = placement.estimator(self.now.log_probs.flatten(0, 1), ref.flatten(0, 1)).view(k, -1)
            return self.now.of_states(of_state)
        old = self._sampler.logps.detach()
        available = {"old_logps": old, "sampler_logps": old}
        needed = {name: x.flatten(0, 1) for name, x in available.items() if name in placement.estimator.needs}
        ref_logps = self._ref.logps.expand_as(old).flatten(0, 1)
        mask = self.world.mask.repeat(k, 1)
        value = placement.measure(self.now.logps.flatten(0, 1), ref_logps, mask, **needed)
        return value.view(k, n, *value.shape[1:])


def distance(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |got|."""
    size = float(got.norm())
    return float((got - want).norm()) / size if size else float(want.norm() > 0)


def snapped(x: float) -> float:
    """Round `x` to a fraction of small numbers or 1 over an integer, if it equals one up to rounding."""
    near = fraction(x)
    return x if near is None else float(near)


def fraction(x: float) -> Fraction | None:
    """Return the fraction that `snapped` rounds to, or None."""
    inverse = round(1 / x) if abs(x) > 1e-6 else 0
    for near in (Fraction(x).limit_denominator(24), Fraction(1, inverse) if inverse else Fraction(0)):
        if abs(x - near) < 1e-7 * abs(x):
            return near
    return None


def nearest(field: Tensor, candidates: list[Candidate]) -> Match:
    """Return the first candidate that matches `field` (K, S, V) with one factor for all policies, or the nearest."""
    best: Match | None = None
    for candidate in candidates:
        size = float(candidate.gradient.square().sum())
        factor = snapped(float((field * candidate.gradient).sum()) / size) if size else 0.0
        error = distance(field, factor * candidate.gradient)
        match = Match(candidate.name, factor, candidate.gradient, error)
        if match.found:
            return match
        if best is None or error < best.error:
            best = match
    assert best is not None
    return best


def parallel(field: Tensor, gradient: Tensor) -> float:
    """Return the error with a separate positive factor at each policy; infinite if a factor is not positive."""
    factors = (field * gradient).sum((1, 2)) / gradient.square().sum((1, 2)).clamp(min=1e-300)
    if bool((factors <= 0).any()):
        return math.inf
    return distance(field, factors[:, None, None] * gradient)
