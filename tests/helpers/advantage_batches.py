"""Batches for tests of advantage estimators, and every estimator in a setting or two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.testing import scored

GROUP: dict[str, dict[str, Any]] = {
    "group_mean": {},
    "group_norm": {},
    "group_mean_batch_std": {},
    "leave_one_out": {},
    "opo": {},
    "gpg": {},
    "maxrl": {},
    "pass_at_k": {},
}
"""Estimators that give each row one number from the returns of its group alone."""

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *GROUP.items(),
    ("group_norm", {"ddof": 0}),
    ("group_norm", {"statistics": "others"}),
    ("opo", {"leave_one_out": True}),
    ("gpg", {"dialect": "verl"}),
    ("maxrl", {"all_wrong": -1}),
    ("pass_at_k", {"normalise": "std"}),
    ("gdpo", {}),
    ("reinforce_plus_plus_baseline", {}),
    ("reinforce_plus_plus", {"gamma": 0.9}),
    ("reinforce", {"gamma": 0.9}),
    ("reward_to_go", {"gamma": 0.9}),
    ("remax", {}),
    ("optimal_token_baseline", {}),
    ("optimal_token_baseline", {"leave_one_out": True}),
    ("optimal_token_baseline", {"align": "sampled"}),
    ("turn_group_norm", {}),
    ("gigpo", {"scale": "none", "step_weight": 0.5}),
    ("turn_gae", {"gamma": 0.9, "lam": 0.5}),
    ("gae", {"gamma": 0.9, "lam": 0.5}),
    ("gae", {"length_adaptive": 0.5, "lam_critic": 1.0, "whiten": True, "ddof": 0}),
    *(("baseline", {"baseline": name}) for name in ("constant", "ema", "others_mean", "greedy", "critic")),
    ("mix", {"parts": ["gae", "pass_at_k"], "weights": [1.0, 0.5]}),
    ("mix", {"parts": ["remax", "group_norm"], "weights": [1.0, -0.5]}),
]


def title(case: tuple[str, dict[str, Any]]) -> str:
    """A case of SETTINGS in words."""
    return " ".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def of(batch: Scored, name: str, **settings: Any) -> Tensor:
    """The advantages (N, T) of an estimator."""
    credit = load_plugin("advantages", name, **settings)(batch)
    return credit.advantages if isinstance(credit, Credit) else credit


def bandit(
    rewards: Sequence[float],
    groups: Sequence[int] | None = None,
    length: int = 3,
    dtype: torch.dtype = torch.float64,
    **fields: Any,
) -> Scored:
    """One reward per row, at the last of `length` tokens."""
    token_rewards = torch.zeros(len(rewards), length, dtype=dtype)
    token_rewards[:, -1] = torch.tensor(rewards, dtype=dtype)
    group_ids = torch.tensor(groups or [0] * len(rewards))
    return Scored(mask=torch.ones_like(token_rewards), token_rewards=token_rewards, group_ids=group_ids, **fields)


def full(group_sizes: Sequence[int] = (4, 3, 1, 2), length: int = 8, seed: int = 0, **fields: Any) -> Scored:
    """Random, with every field an estimator may read, tool tokens, and two sources of which one skips some rows.

    Token rewards are shares of the total score less the KL; every return is positive.
    """
    batch = scored(group_sizes=group_sizes, length=length, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    mask, rows = batch.mask, len(batch.mask)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    scores = {"a": 0.5 + (4 * draw(rows)).round() / 4, "b": 1 + draw(rows)}
    scores["b"][::3] = torch.nan
    weights = {"a": 1.0, "b": 0.5}
    total = scores["a"] + 0.5 * scores["b"].nan_to_num()
    share = (0.1 + draw(rows, length)) * mask
    kl = 0.05 * draw(rows, length) * mask
    assert batch.old_logps is not None
    probs = batch.old_logps.exp()
    made: dict[str, Any] = {
        "token_rewards": total[:, None] * share / share.sum(1, keepdim=True) - kl,
        "kl_penalties": kl,
        "scores": scores,
        "weights": weights,
        "greedy": draw(len(group_sizes))[batch.groups()[0]],
        "sum_sq_probs": probs**2 + (1 - probs) ** 2 * draw(rows, length),
    }
    return scored(group_sizes=group_sizes, length=length, seed=seed, **{**made, **fields})
