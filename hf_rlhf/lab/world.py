"""World small enough to enumerate: prompts, all completions of each, rewards, a reference and policies, in float64.

A policy is a table of logits, one row per state (the tokens so far). Token 0 ends a completion, which is otherwise truncated
after `length` tokens. With several turns these are turns: after each the environment says one token, whether the turn's sum is
odd, and the next turn begins; a turn that begins with the last token ends the episode. Groups that differ only in the order of
their rows have the same gradient, so each multiset of completions is enumerated once, with its multinomial probability. The
seed determines all numbers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.losses import at_last_token

LARGEST = 200_000
"""Maximum number of rollouts of a world."""
SOURCES = {"first": 1.0, "second": 0.5}
"""Weights of the reward sources of a world with real-valued rewards, by label."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Sizes of a world, from which everything else is computed on demand.

    n completions of all prompts together, S states, V tokens, T = `width`; a rollout has N = `prompts` x `group` rows.
    """

    tokens: int = 3
    """V, including the token that ends a completion."""
    length: int = 3
    """Maximum tokens of a completion, or of each turn."""
    turns: int = 1
    """Maximum turns of an episode."""
    prompts: int = 1
    """Prompts in each rollout, with separate policies."""
    group: int = 3
    """G, completions per prompt."""
    rewards: Literal["real", "binary", "none"] = "real"
    """real: two sources, one real-valued in [0, 1] and one of 0 and 1; binary: one source of 0 and 1; none: no source."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("length", 1), ("turns", 1), ("prompts", 1), ("group", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        over, turns = 0, 1
        for _ in range(self.length):
            over, turns = turns, 1 + (self.tokens - 1) * turns
        completions = turns
        for _ in range(self.turns - 1):
            completions = over + (turns - over) * completions
        multisets = math.comb(completions + self.group - 1, self.group)
        if multisets**self.prompts > LARGEST:
            raise UserError(
                f"the world must have at most {LARGEST} rollouts to enumerate, got {multisets**self.prompts}. Lower "
                "--group, --length, --turns, --tokens or --prompts"
            )

    @property
    def width(self) -> int:
        """T, the most tokens of an episode, the environment's included."""
        return self.turns * (self.length + 1) - 1

    @cached_property
    def episodes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(tokens, turn that sampled each, -1 for the environment's) of each completion of a prompt."""
        return _episodes(self.tokens, self.length, self.turns)

    @cached_property
    def sequences(self) -> list[tuple[int, tuple[int, ...]]]:
        """(prompt, tokens) of each completion, n of them, prompt by prompt."""
        return [(prompt, s) for prompt in range(self.prompts) for s, _ in self.episodes]

    @cached_property
    def states(self) -> list[tuple[int, tuple[int, ...]]]:
        """(prompt, tokens so far) of each state in which a token is sampled, S of them."""
        of_prompt = {s[:t] for s, turns in self.episodes for t in range(len(s)) if turns[t] >= 0}
        return sorted((prompt, s) for prompt in range(self.prompts) for s in of_prompt)

    @cached_property
    def state(self) -> Tensor:
        """State in which each token is sampled, (n, T) int; 0 off the mask."""
        place = {state: i for i, state in enumerate(self.states)}
        return torch.tensor(
            [self._padded([place.get((p, s[:t]), 0) for t in range(len(s))]) for p, s in self.sequences]
        )

    @cached_property
    def token(self) -> Tensor:
        """Tokens (n, T) int; 0 in the padding."""
        return torch.tensor([self._padded(s) for _, s in self.sequences])

    @cached_property
    def turn(self) -> Tensor:
        """Turn that sampled each token, (n, T) int; -1 off the mask."""
        return torch.tensor([self._padded(turns, -1) for _, turns in self.episodes]).repeat(self.prompts, 1)

    @cached_property
    def anchor(self) -> Tensor:
        """State in which the turn of each token began, (n, T) int: 0 at the start, then 1 or 2 by what the environment said
        last; -1 off the mask."""
        said = (self.turn == -1) * (1 + self.token)
        last = [said[:, : t + 1].flip(1) for t in range(self.width)]
        found = torch.stack([x.gather(1, (x > 0).int().argmax(1, keepdim=True)).squeeze(1) for x in last], 1)
        return found.masked_fill(self.turn == -1, -1)

    @cached_property
    def mask(self) -> Tensor:
        """Mask (n, T), 1 on tokens of the policy."""
        return (self.turn >= 0).double()

    @cached_property
    def lengths(self) -> Tensor:
        """Number of tokens that the policy sampled in each completion, (n,)."""
        return self.mask.sum(1)

    @cached_property
    def finished(self) -> Tensor:
        """False for truncated completions, (n,) bool."""
        return torch.tensor([s[-1] == 0 for _, s in self.sequences])

    @cached_property
    def prompt(self) -> Tensor:
        """Prompt of each completion, (n,) int."""
        return torch.tensor([p for p, _ in self.sequences])

    def _padded(self, row: Sequence[float], fill: float = 0) -> list[float]:
        return [*row, *[fill] * (self.width - len(row))]

    # What the seed decides

    def draw(self, *shape: int, stream: int) -> Tensor:
        """Draw normal numbers; each `stream` is a separate sample."""
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def table(self, which: int) -> Tensor:
        """Return the logits (S, V) of a policy; 0 is the studied one, the others are witnesses."""
        return self.draw(len(self.states), self.tokens, stream=10 + which)

    @cached_property
    def reference(self) -> Tensor:
        """Logits (S, V) of the reference."""
        return self.draw(len(self.states), self.tokens, stream=1)

    @cached_property
    def arbitrary_values(self) -> Tensor:
        """Values (S,) of an untrained critic."""
        return self.draw(len(self.states), stream=2)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Unweighted scores (n,) of each reward source, by label."""
        if self.rewards == "none":
            return {}
        n = len(self.sequences)
        binary = (self.draw(n, stream=4) > 0).double()
        for p in range(self.prompts):  # each prompt has correct and wrong completions
            first, *_, last = (self.prompt == p).nonzero().flatten().tolist()
            binary[first], binary[last] = 0.0, 1.0
        if self.rewards == "binary":
            return {"first": binary}
        return {"first": self.draw(n, stream=3).sigmoid() + self.early.sum(1), "second": binary}

    @cached_property
    def early(self) -> Tensor:
        """Real-valued rewards at the ends of turns before the last, (n, T), which depend on the tokens up to there."""
        placed, known = self.mask.new_zeros(len(self.sequences), self.width), dict[tuple[int, tuple[int, ...]], float]()
        numbers = self.draw(len(self.states), stream=6).sigmoid().tolist() if self.rewards == "real" else []
        for i, (prompt, s) in enumerate(self.sequences if numbers else ()):
            for t in range(len(s) - 1):
                if self.turn[i, t + 1] == -1:
                    key = (prompt, s[: t + 1])
                    placed[i, t] = known.setdefault(key, numbers[len(known)])
        return placed

    @cached_property
    def token_rewards(self) -> Tensor:
        """Weighted rewards (n, T) at the ends of turns, whose sum is `reward`."""
        early = self.weights.get("first", 0.0) * self.early
        return early + at_last_token(self.reward - early.sum(1), self.mask)

    @cached_property
    def weights(self) -> dict[str, float]:
        """Weight of each reward source, by label."""
        return {label: SOURCES[label] for label in self.scores}

    @cached_property
    def reward(self) -> Tensor:
        """Weighted total reward r, (n,)."""
        total = self.mask.new_zeros(len(self.sequences))
        return sum((self.weights[label] * x for label, x in self.scores.items()), start=total)

    # Rollouts

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """Completions of every group of a prompt, (M, G) int, numbered within the prompt, and each one's number of orders,
        (M,)."""
        each = range(len(self.episodes))
        groups = list(itertools.combinations_with_replacement(each, self.group))
        orders = [
            math.factorial(self.group) / math.prod(map(math.factorial, Counter(group).values())) for group in groups
        ]
        return torch.tensor(groups), torch.tensor(orders, dtype=torch.float64)

    @cached_property
    def rollouts(self) -> tuple[Tensor, Tensor]:
        """Completions of every rollout, (R, N) int, and each one's number of orders, (R,)."""
        groups, orders = self.groups
        per_prompt = len(self.sequences) // self.prompts
        chosen = torch.cartesian_prod(*[torch.arange(len(groups))] * self.prompts).view(-1, self.prompts)
        rows = torch.cat([groups[chosen[:, p]] + p * per_prompt for p in range(self.prompts)], 1)
        return rows, orders[chosen].prod(1)

    @cached_property
    def group_ids(self) -> Tensor:
        """Prompt of each row of a rollout, (N,) int."""
        return torch.arange(self.prompts).repeat_interleave(self.group)

    def optimum(self, beta: float) -> Tensor:
        """Return the logits (S, V) of pi* = ref e^{r / beta} / Z, which maximizes E[r] - beta KL(pi || ref)."""
        ref_logps = (self.reference.log_softmax(1)[self.state, self.token] * self.mask).sum(1)
        mass = ref_logps + self.reward / beta
        table = torch.full((len(self.states), self.tokens), float("-inf"), dtype=torch.float64)
        for t in range(self.width):
            on = self.mask[:, t] > 0
            for i in on.nonzero().flatten().tolist():
                s, v = self.state[i, t], self.token[i, t]
                table[s, v] = torch.logaddexp(table[s, v], mass[i])
        return table


def _episodes(
    tokens: int, length: int, turns: int, before: tuple[int, ...] = (), numbers: tuple[int, ...] = ()
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (tokens, turn of each token) of all episodes that begin with these, of which `turns` turns are left at most."""
    found, number = [], max(numbers, default=-1) + 1
    for s in _completions(tokens, length):
        ids, own = (*before, *s), (*numbers, *[number] * len(s))
        if turns == 1 or s[0] == tokens - 1:
            found.append((ids, own))
        else:
            found += _episodes(tokens, length, turns - 1, (*ids, sum(s) % 2), (*own, -1))
    return found


def _completions(tokens: int, length: int, prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Return all completions that start with `prefix`: up to `length` tokens, 0 only as the last."""
    if len(prefix) == length or prefix[-1:] == (0,):
        return [prefix]
    return [s for token in range(tokens) for s in _completions(tokens, length, (*prefix, token))]


@dataclass(frozen=True)
class Policies:
    """K policies of one world, with logits `tables` (K, S, V); differentiable if these are."""

    world: World
    tables: Tensor

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probs (K, S, V) of each token in each state."""
        return self.tables.log_softmax(2)

    @cached_property
    def logps(self) -> Tensor:
        """Log-probs (K, n, T) of each completion's tokens; 0 in the padding."""
        return self.log_probs[:, self.world.state, self.world.token] * self.world.mask

    @cached_property
    def probability(self) -> Tensor:
        """Probability (K, n) of each completion, given its prompt."""
        return self.logps.sum(2).exp()

    @cached_property
    def rollout_probability(self) -> Tensor:
        """Probability (K, R) of each rollout; sums to 1."""
        rows, orders = self.world.rollouts
        return self.probability[:, rows].prod(2) * orders

    def mean(self, x: Tensor) -> Tensor:
        """Return the expectation (K,) of (K, n) or (n,) over completions, averaged over the prompts."""
        return (self.probability * x).sum(1) / self.world.prompts

    def entropy(self) -> Tensor:
        """Return the entropy (K, S) of each state's distribution, in nats."""
        return -(self.log_probs.exp() * self.log_probs).sum(2)

    def of_states(self, x: Tensor) -> Tensor:
        """Look up values (K, S) at the state of each token: (K, n, T), 0 in the padding."""
        return x[:, self.world.state] * self.world.mask

    @cached_property
    def greedy(self) -> Tensor:
        """Reward (K, n) of the greedy completion of each completion's prompt."""
        best = self.log_probs.detach().argmax(2)[:, self.world.state] == self.world.token
        chosen = (best | (self.world.mask == 0)).all(2)
        of_prompt = [
            (chosen * self.world.reward * (self.world.prompt == p)).sum(1, keepdim=True)
            for p in range(self.world.prompts)
        ]
        return torch.cat(of_prompt, 1)[:, self.world.prompt]
