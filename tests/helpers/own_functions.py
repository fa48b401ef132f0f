"""Functions as a user would write them for the plugins `function` of several axes."""

from __future__ import annotations

import torch


def adv(scored, scores):
    """The leave_one_out of groups of equal size."""
    reward = sum(scored.weights[label] * x.nan_to_num() for label, x in scores.items())
    same = scored.group_ids[:, None] == scored.group_ids
    size = same.sum(1)
    mean = (same * reward).sum(1) / size
    return ((reward - mean) * size / (size - 1).clamp(min=1)).unsqueeze(1) * scored.mask


adv.across_groups = False


def loss(logps, advantages, mask):
    return -(logps * advantages).masked_fill(mask == 0, 0.0)


loss.token_level = loss.zero_without_advantage = True


def clip(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).masked_fill(mask == 0, 0.0).clamp(max=20).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * mask


def k3(logps, ref_logps):
    d = ref_logps - logps
    return d.expm1() - d


def keep(scored):
    return scored.mask.sum(1) >= 3


def three(scored):
    return torch.ones(3)


def detached(logps, advantages, mask):
    return -(logps * logps.detach() * advantages).masked_fill(mask == 0, 0.0)


def undeclared(logps, ref_logps):
    return logps.detach() - ref_logps


def rest(scored, *more):
    return scored.mask


def unknown(scored, colour):
    return scored.mask


def ones(scored):
    return scored.mask


def ended(scored):
    return scored.finished.bool()


def keep_all(scored):
    return scored.mask.sum(1) > -1


def k2(logps, ref_logps):
    return (logps - ref_logps) ** 2 / 2


def twice(logps, advantages, mask):
    return 2 * loss(logps, advantages, mask)


def context(rollouts):
    return [f"think of {answer}" for answer in rollouts.column("answer")]


def sibling(rollouts, scores):
    """The best other completion of each row's group, where it is better than the row's own."""
    found = []
    for i, group in enumerate(rollouts.group_ids):
        best = max((scores["total"][j], -j) for j, g in enumerate(rollouts.group_ids) if g == group)
        found.append(rollouts.completions[-best[1]] if best[0] > scores["total"][i] else None)
    return found
