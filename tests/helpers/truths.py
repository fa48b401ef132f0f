"""Exact expectations of a small enumerated policy, written out and differentiated by autograd, and what the lab gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.lab.choices import in_world
from hf_rlhf.lab.study import WITNESSES, Lab, Row
from hf_rlhf.lab.world import Policies, World

BETA = 0.3
Plugins = str | dict[str, Any]


class Truth:
    """Gradients of exact expectations at the lab's first policies, each (K, S, V)."""

    def __init__(self, lab: Lab):
        self.world, e = lab.world, lab.expectation
        self.tables = e.policies.tables[:WITNESSES].clone().requires_grad_()
        self.now = Policies(self.world, self.tables)
        self.ref = Policies(self.world, self.world.reference[None])
        self.old = Policies(self.world, e.sampler.tables[:WITNESSES])
        self.log_ratio = (self.now.logps - self.ref.logps).sum(2)

    def gradient(self, objective: Tensor) -> Tensor:
        return torch.autograd.grad(objective.sum(), self.tables, retain_graph=True)[0]

    def mean(self, x: Tensor) -> Tensor:
        """grad E[x] of a number for each completion."""
        return self.gradient((self.now.probability * x).sum(1) / self.world.prompts)

    @cached_property
    def reward(self) -> Tensor:
        return self.mean(self.world.reward)

    @cached_property
    def kl(self) -> Tensor:
        return self.mean(self.log_ratio)

    @cached_property
    def kl_of_reference(self) -> Tensor:
        return self.gradient(-(self.ref.probability * self.log_ratio).sum(1))

    def per_state(self, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Of the next token's distributions, in every state that is visited, the visits held fixed."""
        of_state = divergence(self.now.log_probs, self.ref.log_probs).sum(2)
        return self.gradient((self.old.probability * self.now.of_states(of_state).sum(2)).sum(1))

    @cached_property
    def reverse(self) -> Tensor:
        return self.per_state(lambda p, q: p.exp() * (p - q))

    @cached_property
    def forward(self) -> Tensor:
        return self.per_state(lambda p, q: q.exp() * (q - p))


@cache
def lab(beta: float = BETA, off_policy: bool = False, values: Any = "exact", **sizes: Any) -> Lab:
    return Lab(world=World(**sizes), beta=beta, off_policy=off_policy, values=values)


@cache
def truth(lab: Lab) -> Truth:
    return Truth(lab)


def made(axis: str, given: Plugins) -> Any:
    settings = {"use": given} if isinstance(given, str) else dict(given)
    return load_plugin(axis, settings.pop("use"), **settings)


def algorithm(
    where: Lab, advantages: Plugins, *kl: dict[str, Any], policy_loss: Plugins = "reinforce", **more: Plugins
) -> Algorithm:
    return in_world(
        where.world,
        advantages=made("advantages", advantages),
        kl=[made("kl", {"beta": BETA, **settings}) for settings in kl],
        policy_loss=made("policy_loss", policy_loss),
        aggregation=made("aggregation", more.get("aggregation", "seq_mean_token_sum")),
    )


def ascent(where: Lab, *choices: Any, **more: Any) -> Tensor:
    """The expected direction of an optimizer step, minus the gradient of the loss, at the lab's first policies."""
    return where.gradients(algorithm(where, *choices, **more)).mean[:WITNESSES]


def study(where: Lab, *choices: Any, **more: Any) -> Row:
    return where.study(algorithm(where, *choices, **more))


def of_the_kl(where: Lab, *kl: dict[str, Any], advantages: Plugins = "reinforce", **more: Any) -> Tensor:
    """What KLs take from the expected direction, over beta."""
    return (ascent(where, advantages, **more) - ascent(where, advantages, *kl, **more)) / BETA


def close(got: Tensor, want: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    assert want.abs().max() > 1e-3, "the case must not be trivial"


def differs(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() > 1e-3


def kl(use: str, estimator: str, level: str = "token") -> dict[str, Any]:
    return {"use": use, "estimator": estimator, "level": level}


K1 = kl("in_reward", "k1")
