"""A rollout small enough to print, and the numbers that an algorithm's plugins compute from it.

Two prompts have four completions each, of one to four tokens, over a vocabulary of two tokens: the sampled one and
another. The policy has been updated once since the rollout, so that ratios are not 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import KLEstimator, KLPlacement, TextTerm, TrainedCritic
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.references import on_one_reference
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.training.losses import DISTRIBUTION, POLICY_GETS, at_last_token, measured, policy_terms, value_term
from hf_rlhf.training.rollout_buffer import selection

SCORES = [1, 0, 0, 0, 1, 1, 0, 1]
"""Scores of the first reward source for four completions of one prompt and four of another."""
GREEDY = [0, 1]
"""Scores of the greedy completions of the two prompts."""
LONG = -0.5
"""Score of further reward sources for completions of four tokens; 0 for the others."""
OLD = [[50, 40], [25, 50, 5, 40], [60], [30, 80, 50], [40, 50, 25], [70], [45, 60], [20, 30, 50, 80]]
"""Probability in percent of each token under the rollout policy."""
NEW = [[55, 56], [30, 35, 70, 40], [54], [33, 72, 45], [44, 55, 20], [77], [36, 30], [26, 36, 50, 72]]
"""Probability in percent of each token under the current policy."""
REFERENCE = [[40, 40], [50, 25, 20, 50], [75], [30, 60, 50], [50, 40, 25], [50], [60, 60], [25, 20, 60, 80]]
SAMPLER = [[50, 40], [10, 50, 5, 40], [60], [30, 80, 50], [40, 50, 25], [70], [45, 60], [20, 30, 50, 80]]
"""Probability in percent reported by the sampler: one token was less likely than in the trainer."""
VALUES = [[50, 60], [40, 40, 20, 30], [30], [20, 20, 10], [60, 70, 80], [70], [50, 40], [40, 50, 60, 60]]
"""Values of a critic, in percent."""


@dataclass(kw_only=True)
class WorkedExample:
    """Results for each row: (8, T) tensors, NaN on dropped rows, 0 off the mask, and the terms of the loss."""

    mask: Tensor
    score: Tensor | None
    """Total score of each row (8,); None without rewards."""
    ratio: Tensor
    rewards: Tensor
    """Rewards at their tokens, after the KL in the reward."""
    advantages: Tensor
    weights: Tensor
    losses: Tensor
    """Policy loss of each token, before its weight."""
    gradient: Tensor
    """Negative gradient of the whole loss in each token's log-prob: if positive, the token becomes more likely."""
    kept: Tensor
    """Rows kept by the filters, (8,) bool."""
    terms: dict[str, float]


def inputs() -> dict[str, Tensor]:
    """Return the data of the rollout and of the current policy, rows first, in float64."""

    def logs(percents: list[list[int]]) -> Tensor:
        return _padded([[p / 100 for p in row] for row in percents], 0.5).log()

    mask = _padded([[1.0] * len(row) for row in OLD], 0.0)
    rows, places = torch.arange(len(OLD)), torch.arange(mask.size(1))
    old = logs(OLD)
    return {
        "mask": mask,
        "group_ids": rows // 4,
        "old_logps": old,
        "logps": logs(NEW),
        "ref_logps": logs(REFERENCE),
        "sampler_logps": logs(SAMPLER),
        "values": _padded([[v / 100 for v in row] for row in VALUES], 0.0),
        "old_entropy": -(_both(old).exp() * _both(old)).sum(-1) * mask,
        "sum_sq_probs": (old.exp() ** 2 + (1 - old.exp()) ** 2) * mask,
        "greedy": torch.tensor(GREEDY, dtype=torch.float64).repeat_interleave(4),
        "score": torch.tensor(SCORES, dtype=torch.float64),
        "further": LONG * (mask.sum(1) == 4),
        "finished": torch.ones(len(rows), dtype=torch.bool),
        "turns": (places // 2).expand_as(mask).masked_fill(mask == 0, -1),  # two tokens each
        "states": (places // 2).expand_as(mask).masked_fill(mask == 0, -1),
        "completion_ids": ((10 * (rows[:, None] + 1) + places) * mask).long(),
    }


def work(algorithm: Algorithm) -> WorkedExample:
    """Compute one optimizer step on the example with the algorithm's plugins, but terms on experts: its policy has none. Its
    one reference stands for those of all KLs."""
    terms = [term for term in algorithm.loss_terms if "router_logits" not in term.needs]
    t, a = inputs(), replace(algorithm, loss_terms=terms, kl=on_one_reference(algorithm.kl))
    scored, total = _scored(a, t)
    rows = _kept(a, scored, torch.arange(len(t["mask"])), after=False)
    part = _rows(scored, rows)
    credit = Credit.of(a.advantages(part))
    advantages = credit.advantages
    known = {**{name: x[rows] for name, x in t.items()}, "logps": t["old_logps"][rows]}
    for title, kl in a.kl_in("advantage"):
        penalty = kl.advantage_penalty(_measured(a, title, kl, known))
        advantages = advantages - (penalty if penalty.dim() == 2 else penalty.unsqueeze(1)) * part.mask
    batch = {name: x[rows] for name, x in t.items()}
    batch |= {"advantages": advantages, "total_score": total[rows]}
    for name in ("returns", "value_mask"):
        if (found := getattr(credit, name)) is not None:
            batch[name] = found
    if "selected" in a.policy_loss.needs:
        batch["selected"] = selection(a.policy_loss, batch)
    left = _kept(a, replace(part, advantages=advantages), torch.arange(len(rows)), after=True)
    batch, rows = {name: x[left] for name, x in batch.items()}, rows[left]
    return _update(a, batch, rows, t, scored, total)


def _scored(a: Algorithm, t: dict[str, Tensor]) -> tuple[Scored, Tensor]:
    """Return the rollout as estimators see it, and each row's total score."""
    mask = t["mask"]
    scores = {label: t["further" if i else "score"] for i, label in enumerate(a.labels())}
    weights = {label: source.weight for label, source in zip(a.labels(), a.rewards, strict=True)}
    total = sum((weights[label] * score for label, score in scores.items()), start=t["score"] * 0)
    known, taken = {**t, "logps": t["old_logps"]}, torch.zeros_like(mask)
    for title, kl in a.kl_in("reward"):
        penalty = kl.reward_penalty(_measured(a, title, kl, known))
        taken = taken + (penalty if penalty.dim() == 2 else at_last_token(penalty, mask))
    optional = (
        "values",
        "old_logps",
        "ref_logps",
        "sampler_logps",
        "old_entropy",
        "sum_sq_probs",
        "greedy",
        "finished",
        "turns",
        "states",
    )
    scored = Scored(
        mask=mask,
        token_rewards=at_last_token(total, mask) - taken,
        group_ids=t["group_ids"],
        kl_penalties=taken if a.kl_in("reward") else None,
        scores=scores,
        weights=weights,
        completion_ids=t["completion_ids"],
        **{name: t[name] for name in optional if name in t},
    )
    return scored, total


def _update(
    a: Algorithm, batch: dict[str, Tensor], rows: Tensor, t: dict[str, Tensor], scored: Scored, total: Tensor
) -> WorkedExample:
    mask, meters = batch["mask"], MetricAggregator()
    if "sampler_logps" in a.rollout_correction.needs:
        batch["correction"] = a.rollout_correction(batch["old_logps"], batch["sampler_logps"], mask)
    batch["weights"] = a.aggregation(mask, **a.extras(a.aggregation, batch, frozenset()))
    of_values = batch.get("value_mask", mask)
    batch["value_weights"] = of_values / of_values.sum().clamp(min=1)
    for i, term in enumerate(a.loss_terms):
        if not isinstance(term, TextTerm):
            batch[f"term_weights:{i}"] = term.weights(mask, **a.extras(term, batch, frozenset()))
    logps = batch.pop("logps").requires_grad_()
    new = {"logps": logps, "entropy": -(_both(logps).exp() * _both(logps)).sum(-1) * mask}
    for title, kl in a.kl_in("loss"):
        if "full_distribution" in kl.estimator.needs:
            new[f"{DISTRIBUTION}{title}"] = kl.estimator(_both(logps)[mask > 0], _both(batch["ref_logps"])[mask > 0])
            new[f"{DISTRIBUTION}{title}"] = torch.zeros_like(mask).masked_scatter(
                mask > 0, new[f"{DISTRIBUTION}{title}"]
            )
    terms = policy_terms(a, new, batch, meters)
    if isinstance(a.critic, TrainedCritic):
        terms |= value_term(a.critic, batch["values"], batch, meters)
    terms["loss"] = sum(terms.values(), start=torch.zeros((), dtype=mask.dtype))
    (gradient,) = torch.autograd.grad(terms["loss"], logps)
    losses, _ = a.policy_loss(
        logps.detach(), batch["old_logps"], batch["advantages"], mask, **a.extras(a.policy_loss, batch, POLICY_GETS)
    )
    kept = torch.zeros(len(t["mask"]), dtype=torch.bool).index_fill(0, rows, True)

    def back(x: Tensor) -> Tensor:
        return torch.full_like(t["mask"], torch.nan).index_copy(0, rows, x.detach() * mask)

    return WorkedExample(
        mask=t["mask"],
        score=total if a.rewards else None,
        ratio=(t["logps"] - t["old_logps"]).exp() * t["mask"],
        rewards=scored.token_rewards,
        advantages=back(batch["advantages"]),
        weights=back(batch["weights"]),
        losses=back(losses * batch.get("correction", torch.ones_like(mask))),
        gradient=back(-gradient),
        kept=kept,
        terms={name: x.item() for name, x in terms.items()},
    )


def _measured(a: Algorithm, title: str, kl: KLPlacement, known: dict[str, Tensor]) -> Tensor:
    """Return a KL as measured at rollout."""
    mask = known["mask"]
    if "full_distribution" in kl.estimator.needs:
        value = _of_distributions(kl.estimator, known["logps"], known["ref_logps"], mask)
        known = {**known, f"{DISTRIBUTION}{title}": value}
    return measured(a, title, kl, known, mask, MetricAggregator())


def _of_distributions(estimator: KLEstimator, logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """Return the values (B, T) of an estimator over full distributions."""
    on = mask > 0
    return torch.zeros_like(mask).masked_scatter(on, estimator(_both(logps)[on], _both(ref_logps)[on]))


def _both(logps: Tensor) -> Tensor:
    """Extend the log-probs (...) of the sampled token to those of both tokens, (..., 2)."""
    return torch.stack([logps, torch.log1p(-logps.exp())], -1)


def _kept(a: Algorithm, scored: Scored, rows: Tensor, *, after: bool) -> Tensor:
    """Return the `rows` kept by the filters that need advantages (`after`), or by the others."""
    for chosen in a.filters:
        if ("advantages" in chosen.needs) == after and len(rows):
            rows = rows[chosen(_rows(scored, rows))]
    return rows


def _rows(scored: Scored, rows: Tensor) -> Scored:
    """Select rows."""
    parts: dict[str, Any] = {name: x[rows] for name, x in vars(scored).items() if isinstance(x, Tensor)}
    parts["scores"] = {label: score[rows] for label, score in (scored.scores or {}).items()}
    return replace(scored, **parts)


def _padded(rows: list[list[float]], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True, padding_value=fill
    )
