"""Trust region by enumeration: the surrogate of a policy's samples against the return, as the policy moves away.

With A the exact advantages of the old policy p, the performance-difference lemma (Kakade and Langford, 2002, lemma 6.1) is
J(p') = J(p) + E_{y ~ p'} sum_t A(s_t, a_t). The surrogate L takes the states of p instead. With T tokens at most, alpha the
largest total variation between p' and p in any state and eps the largest |A|,

    |J(p') - L(p')| <= 2 eps T (T - 1) alpha^2,

as the states of step t differ by at most t alpha, and the mean advantage by at most 2 eps alpha. Pinsker's alpha^2 <= KL / 2
makes it the finite-horizon form of TRPO's lower bound (arXiv:1502.05477, theorem 1): J(p') >= L(p') - eps T (T - 1) max KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_rlhf.lab.world import Policies, World

STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Move:
    """A policy some way along the gradient of the return, beside the old one."""

    step: float
    """Length of the way, in logits."""
    total_variation: float
    """alpha, of the state in which it is largest."""
    kl: float
    """KL(p || p') of the state in which it is largest, in nats."""
    gain: float
    """J(p') - J(p)."""
    surrogate: float
    """L(p') - J(p)."""
    bound: float
    """Largest |J - L| that the bound allows."""
    penalized: float
    """L(p') - J(p) minus TRPO's penalty: the gain is never less."""


class OldPolicy:
    """A policy of one prompt, with the exact values of its states."""

    def __init__(self, world: World, table: Tensor):
        self.world, self.policy = world, Policies(world, table[None])
        self.p = self.policy.log_probs[0].exp()

    def visits(self, policy: Policies) -> Tensor:
        """Return the probability (S,) that a completion of `policy` passes each state."""
        world, on = self.world, self.world.mask > 0
        each = policy.probability[0, :, None].expand_as(world.mask)
        return each.new_zeros(len(world.states)).index_add(0, world.state[on], each[on])

    @cached_property
    def advantages(self) -> Tensor:
        """Exact A(s, a) = Q(s, a) - V(s), (S, V)."""
        world, on = self.world, self.world.mask > 0
        place = (world.state * world.tokens + world.token)[on]
        each = self.policy.probability[0, :, None].expand_as(world.mask)
        zero = each.new_zeros(len(world.states) * world.tokens)
        mass = zero.index_add(0, place, each[on])
        returns = zero.index_add(0, place, (each * world.reward[:, None])[on])
        q = (returns / mass).view(len(world.states), world.tokens)
        return q - (self.p * q).sum(1, keepdim=True)

    def expected_advantage(self, states: Policies, actions: Policies) -> float:
        """Return E sum_t A(s_t, a_t) with the states of one policy and the actions of another."""
        return float((self.visits(states)[:, None] * actions.log_probs[0].exp() * self.advantages).sum())

    def move(self, direction: Tensor, step: float) -> Move:
        """Return what is known of the policy `step` along a direction (S, V) of length 1."""
        new = Policies(self.world, self.policy.tables + step * direction)
        q = new.log_probs[0].exp()
        alpha = float((q - self.p).abs().sum(1).max() / 2)
        kl = float((self.p * (self.policy.log_probs[0] - new.log_probs[0])).sum(1).max())
        surrogate = self.expected_advantage(self.policy, new)
        factor = float(self.advantages.abs().max()) * self.world.length * (self.world.length - 1)
        return Move(
            step=step,
            total_variation=alpha,
            kl=kl,
            gain=float(new.mean(self.world.reward) - self.policy.mean(self.world.reward)),
            surrogate=surrogate,
            bound=2 * factor * alpha**2,
            penalized=surrogate - factor * kl,
        )


def moves(world: World, steps: Sequence[float] = STEPS) -> list[Move]:
    """Return the moves along the gradient of the return from the studied policy of a world with one prompt."""
    table = world.table(0)
    leaf = table.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Policies(world, leaf[None]).mean(world.reward).sum(), leaf)
    old = OldPolicy(world, table)
    return [old.move(gradient / gradient.norm(), step) for step in steps]
