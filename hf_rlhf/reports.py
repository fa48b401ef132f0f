"""What is logged of a rollout: rewards, lengths, advantages, drift from the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hf_rlhf.batch import Credit, Scored

Put = Callable[[str, float], None]
"""(name, a number that is equal on every process)."""


def report_rewards(put: Put, table: dict[str, Tensor], labels: Sequence[str]) -> None:
    """Rewards and lengths of all N rows, before anything is filtered."""
    valid = table["valid"].bool()
    for label in labels:
        x = table[f"score:{label}"]
        put("health/reward_missing", x.isnan().sum().item())
        _put_mean_std(put, f"reward/{label}", x[~x.isnan()])
    _put_mean_std(put, "reward/total", table["total"][valid])
    mask, totals = table["mask"][valid], table["total"][valid]
    scored = Scored(mask=mask, token_rewards=mask, group_ids=table["group_ids"][valid])
    compared = scored.group_size() > 1
    if compared.any():
        put("reward/zero_std_frac", scored.group_is_flat(totals)[compared].float().mean().item())
    lengths = table["mask"].sum(1)
    put("rollout/length/mean", lengths.mean().item())
    put("rollout/length/min", lengths.min().item())
    put("rollout/length/max", lengths.max().item())
    put("rollout/truncated_frac", 1 - table["finished"].float().mean().item())
    put("rollout/tokens", lengths.sum().item())


def report_credit(put: Put, scored: Scored, credit: Tensor | Credit) -> None:
    """Advantages and, with a critic, how well it predicts its targets."""
    advantages, on = credit.advantages if isinstance(credit, Credit) else credit, scored.mask > 0
    _put_mean_std(put, "reward/after_kl", scored.returns())
    _put_mean_std(put, "advantage", advantages[on])
    put("advantage/min", advantages[on].min().item())
    put("advantage/max", advantages[on].max().item())
    if isinstance(credit, Credit) and scored.values is not None:
        target, error = credit.returns[on], credit.returns[on] - scored.values[on]
        if target.var() > 0:
            put("value/explained_var", (1 - error.var() / target.var()).item())
        put("value/mean", scored.values[on].mean().item())


def report_drift(put: Put, table: dict[str, Tensor]) -> None:
    """Mean k1 from the reference over the rollout, and how far the sampler is from the trainer; where both are known."""
    mask = table["mask"]
    put("rollout/rows", len(mask))
    if not len(mask):
        return
    if "old_logps" in table and "ref_logps" in table:
        k1 = ((table["old_logps"] - table["ref_logps"]) * mask).sum()
        put("kl/rollout/sequence", (k1 / len(mask)).item())
        put("kl/rollout/token", (k1 / mask.sum().clamp(min=1)).item())
    if "old_logps" in table and "sampler_logps" in table:
        gap = ((table["old_logps"] - table["sampler_logps"]) * mask).abs()
        put("rollout/logp_gap/mean", (gap.sum() / mask.sum().clamp(min=1)).item())
        put("rollout/logp_gap/max", gap.max().item())


def _put_mean_std(put: Put, name: str, x: Tensor) -> None:
    if len(x):
        put(f"{name}/mean", x.mean().item())
        put(f"{name}/std", x.std(correction=1 if len(x) > 1 else 0).item())
