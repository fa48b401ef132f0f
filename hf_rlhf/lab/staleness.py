"""Samples of an older policy: the expected gradient of each policy loss and rollout correction, by enumeration.

A policy climbs E[r] by exact gradient steps. Its rollouts were sampled some steps ago, as where an engine runs ahead of the
trainer. Either the old log-probs are the sampler's, and the ratio of the policy loss makes up for the way; or they are the
trainer's own, the ratio is 1, and a rollout correction makes up for it, or nothing does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.config.recipe import load_plugin
from hf_rlhf.contract.base import nested_of
from hf_rlhf.lab.choices import defaults, in_world
from hf_rlhf.lab.expectation import Expectation
from hf_rlhf.lab.world import Policies, World

LEARNING_RATE = 2.0
"""Learning rate of the gradient steps, in logits."""
AGES = (0, 1, 2, 4, 8, 16, 32)
ADVANTAGES, AGGREGATION = "leave_one_out", "seq_mean_token_sum"
CORRECTIONS: tuple[dict[str, Any], ...] = (
    {"use": "none"},
    {"use": "truncated", "level": "token"},
    {"use": "truncated", "level": "sequence"},
    {"use": "masked", "level": "token"},
    {"use": "masked", "level": "sequence"},
)


@dataclass(frozen=True)
class Aged:
    """Expected gradient of one choice, by the age of the samples."""

    policy_loss: str
    correction: str
    """Rollout correction and level; empty where the ratio of the policy loss is to the sampler."""
    cosine: list[float]
    """Cosine with grad E[r] of the policy that is updated."""
    bias: list[float]
    """|expected gradient - grad E[r]| / |grad E[r]|."""


def distances(world: World, ages: Sequence[int] = AGES) -> list[float]:
    """Return the total variation between the completions of the sampler and those of the policy, by age."""
    return [
        float((now.probability - old.probability).abs().sum()) / 2 / world.prompts for old, now in _pairs(world, ages)
    ]


def study(world: World, ages: Sequence[int] = AGES) -> Iterator[Aged]:
    """Yield what each correction, and the ratio of each policy loss, makes of samples of these ages."""
    pairs = list(_pairs(world, ages))
    for settings in CORRECTIONS:
        level = f" {settings['level']}" if "level" in settings else ""
        yield _aged(world, pairs, "reinforce", settings["use"] + level, settings)
    for loss in defaults("policy_loss"):
        if "old_logps" in loss.needs and not any(nested_of(loss)):  # else the ratio is that of another loss
            yield _aged(world, pairs, loss.name, "", None)


def _aged(
    world: World, pairs: list[tuple[Policies, Policies]], loss: str, correction: str, settings: dict[str, Any] | None
) -> Aged:
    algorithm = in_world(
        world,
        advantages=load_plugin("advantages", ADVANTAGES),
        policy_loss=load_plugin("policy_loss", loss),
        aggregation=load_plugin("aggregation", AGGREGATION),
    )
    if settings is not None:
        plugin = load_plugin("rollout_correction", settings["use"], **{k: v for k, v in settings.items() if k != "use"})
        algorithm = dataclasses.replace(algorithm, rollout_correction=plugin)
    cosine, bias = [], []
    for old, now in pairs:
        e = Expectation(world=world, policies=now, sampler=old, proximal=None if settings is None else now)
        advantages = e.advantages(algorithm.advantages, e.kl_penalties(algorithm))
        found, goal = e.policy_part(algorithm, advantages).mean.flatten(), _goal(world, now.tables).flatten()
        cosine.append(float(torch.cosine_similarity(found, goal, dim=0)))
        bias.append(float((found - goal).norm() / goal.norm()))
    return Aged(loss, correction, cosine, bias)


def _pairs(world: World, ages: Sequence[int]) -> Iterator[tuple[Policies, Policies]]:
    """Yield the sampler and the policy after each number of steps."""
    start = world.table(0)[None]
    tables = start
    for step in range(max(ages) + 1):
        if step in ages:
            yield Policies(world, start), Policies(world, tables)
        tables = tables + LEARNING_RATE * _goal(world, tables)


def _goal(world: World, tables: Tensor) -> Tensor:
    """Return grad E[r], (1, S, V)."""
    leaf = tables.detach().clone().requires_grad_()
    return torch.autograd.grad(Policies(world, leaf).mean(world.reward).sum(), leaf)[0]
