"""Statistics of a rollout: rewards, lengths, advantages, drift from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from hf_rlhf.batch import Credit, Scored
from hf_rlhf.modeling.router import ROUTED
from hf_rlhf.runtime.distributed import Reduce

Put = Callable[[str, float], None]
"""(name, number that is equal on every process)."""
MISSING, SCORED = "missing:", "scored"
"""Names read with the metrics but logged under others, or not at all."""
ONE = Reduce()
"""The rows are those of all processes."""
CLIP = 0.2
"""Distance of a ratio from 1 at which PPO clips it."""
Numbers = dict[str, Tensor]
"""Name -> number on the device, NaN if there is none to log."""


def report_rewards(put: Put, table: dict[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """Log rewards and lengths of all N rows before filters, and return them; under SCORED the number of scored rows.

    `weights`: label of each source -> its weight.
    """
    valid, lengths = table["valid"].bool(), table["mask"].sum(1, dtype=table["total"].dtype)
    found: Numbers = {}
    for label in weights:
        x = table.get(f"given:{label}", table[f"score:{label}"])
        found[f"{MISSING}{label}"] = x.isnan().sum()
        found |= _mean_std(f"reward/{label}", x.nan_to_num(), ~x.isnan())
    for label, other in combinations([label for label, weight in weights.items() if weight], 2):
        correlation = _correlation(table[f"score:{label}"], table[f"score:{other}"])
        found[f"reward/{label}/corr/{other}"] = correlation * math.copysign(1.0, weights[label] * weights[other])
    if weights:
        found |= _mean_std("reward/total", table["total"], valid)
        found["reward/zero_std_frac"] = _without_signal(table, valid)
    found |= {
        "rollout/length/mean": lengths.mean(),
        "rollout/length/min": lengths.min(),
        "rollout/length/max": lengths.max(),
        "rollout/truncated_frac": 1 - table["finished"].to(lengths.dtype).mean(),
        "rollout/tokens": lengths.sum(),
        SCORED: valid.sum(),
    }
    numbers = _read(found)
    for name, number in numbers.items():
        if name != SCORED:
            put("health/reward_missing" if name.startswith(MISSING) else name, number)
    return numbers


def given_totals(table: dict[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return each row's weighted total (N,) as the sources gave it, before clipping and normalization; NaN if none did."""
    given = [weight * table.get(f"given:{x}", table[f"score:{x}"]).nan_to_num() for x, weight in weights.items()]
    return sum(given, start=torch.zeros_like(table["total"])).where(table["valid"].bool(), torch.nan)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the correlation over the rows that have both numbers; 0 where one of them does not vary."""
    both = ~(x.isnan() | y.isnan())
    x, y = ((z - _mean(z.nan_to_num(), both)).masked_fill(~both, 0.0) for z in (x, y))
    tiny = torch.finfo(x.dtype).tiny
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp(min=tiny)


def _without_signal(table: dict[str, Tensor], valid: Tensor) -> Tensor:
    """Return the share of rows whose group has equal totals, among valid rows of groups with several."""
    alone = table["group_ids"].where(valid, -1)  # rows that nobody scored are a group of their own
    scored = Scored(mask=table["mask"], token_rewards=table["mask"], group_ids=alone)
    compared = valid & (scored.group_size() > 1)
    return (scored.group_is_flat(table["total"]) & compared).sum() / compared.to(table["total"].dtype).sum()


def report_credit(put: Put, scored: Scored, credit: Credit, over: Reduce = ONE) -> None:
    """Log advantages, the estimator's own metrics and, with a critic, how well it predicts its targets.

    `over`: the processes whose rows `scored` has parts of.
    """
    advantages, on = credit.advantages, scored.mask > 0
    far = torch.finfo(advantages.dtype).max
    found = _mean_std("reward/after_kl", scored.returns(), torch.ones_like(on[:, 0]), over) if scored.scores else {}
    found |= _mean_std("advantage", advantages, on, over)
    ends = [_max(-advantages.masked_fill(~on, far), -far), _max(advantages.masked_fill(~on, -far), -far)]
    least, most = over.max(torch.stack(ends)).unbind()
    found["advantage/min"], found["advantage/max"] = -least, most
    if over.accelerator is None:
        found |= {name: total / count for name, total, count in own_metrics(scored, credit)}
    if credit.returns is not None and scored.values is not None:
        on = on if credit.value_mask is None else credit.value_mask > 0
        _, target = _mean_variance(credit.returns, on, over)
        _, error = _mean_variance(credit.returns - scored.values, on, over)
        found["value/explained_var"] = (1 - error / target).where(target > 0, torch.nan)
        found["value/mean"] = _mean(scored.values, on, over)
    for name, number in _read(found).items():
        put(name, number)


def own_metrics(scored: Scored, credit: Credit) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name, sum and count of each of an estimator's own metrics, over its finite entries (and the mask)."""
    on = scored.mask > 0
    for name, x in credit.metrics.items():
        values = torch.as_tensor(x, device=on.device)
        finite = values.isfinite() & on if values.shape == on.shape else values.isfinite()
        values = values if values.is_floating_point() else values.to(torch.get_default_dtype())
        yield f"advantage/{name}", values.masked_fill(~finite, 0.0).sum(), finite.sum()


def report_drift(
    put: Put,
    every: Tensor,
    table: dict[str, Tensor],
    own: Mapping[str, tuple[str, str]],
    over: Reduce = ONE,
) -> None:
    """Log the mean k1 to the references, the gap between sampler and trainer, and the loads of experts, where they are known.

    `every`: the mask of all rows (N, T), of which `table` has the part of this process of `over`. `own`: title of a KL with a
    reference of its own -> names of its log-probs, and of the mask of the rows that it is taken on.
    """
    mask, count = table["mask"], len(every)
    put("rollout/rows", count)
    if not count:
        return
    tokens = every.sum()
    found: Numbers = {}
    if "old_logps" in table and "ref_logps" in table:
        k1 = over.sum(((table["old_logps"] - table["ref_logps"]) * mask).sum())
        found["kl/rollout/sequence"] = k1 / count
        found["kl/rollout/token"] = k1 / tokens.clamp(min=1)
    for title, (logps, rows) in own.items():
        on = table.get(rows, mask)
        k1 = over.sum(((table["old_logps"] - table[logps]) * on).sum())
        found[f"kl/{title}/rollout/sequence"] = k1 / over.sum((on > 0).any(1).sum())  # NaN, not logged, without a row
        found[f"kl/{title}/rollout/token"] = k1 / over.sum(on.sum())
    if "old_logps" in table and "sampler_logps" in table:
        log_ratio = (table["old_logps"] - table["sampler_logps"]) * mask
        found["rollout/sampler_gap/mean"] = over.sum(log_ratio.abs().sum()) / tokens.clamp(min=1)
        found["rollout/sampler_gap/max"] = over.max(_max(log_ratio.abs(), 0.0))
        beyond = (log_ratio.expm1().abs() > CLIP).any(1).to(mask.dtype).sum()
        found["rollout/sampler_gap/beyond_clip"] = over.sum(beyond) / count
    if ROUTED in table:
        loads = table[ROUTED].sum(0)
        loads = loads / loads.mean(1, keepdim=True)
        found["routing/max_load"], found["routing/min_load"] = loads.max(), loads.min()
        shares = loads / loads.size(1)
        found["routing/entropy"] = -torch.special.xlogy(shares, shares).sum(1).mean() / math.log(loads.size(1))
    for name, number in _read(found).items():
        put(name, number)


def _read(found: Numbers) -> dict[str, float]:
    """Return the numbers that are not NaN, waiting for the device once."""
    if not found:
        return {}
    tensors = list(found.values())
    kind = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32  # which MPS has
    values = torch.stack([x if x.dtype == kind else x.to(kind) for x in tensors]).tolist()
    return {name: x for name, x in zip(found, values, strict=True) if x == x}


def _max(x: Tensor, least: float) -> Tensor:
    """Return the largest number, `least` if there is none."""
    return x.max() if x.numel() else x.new_tensor(least)


def _mean_std(name: str, x: Tensor, on: Tensor, over: Reduce = ONE) -> Numbers:
    """Return mean and unbiased standard deviation of `x` where `on` is True; std 0 for one number, NaN for none."""
    mean, variance = _mean_variance(x, on, over)
    return {f"{name}/mean": mean, f"{name}/std": variance.sqrt()}


def _mean(x: Tensor, on: Tensor, over: Reduce = ONE) -> Tensor:
    return over.sum(x.masked_fill(~on, 0.0).sum()) / over.sum(on.sum())


def _mean_variance(x: Tensor, on: Tensor, over: Reduce = ONE) -> tuple[Tensor, Tensor]:
    off, count, total = ~on, on.sum(), x.masked_fill(~on, 0.0).sum()
    mean = total / count
    squares = ((x - mean).masked_fill(off, 0.0) ** 2).sum()
    if over.accelerator is not None:  # each process's, about its own mean, and those of the means
        counts, totals, parts = over.each(torch.stack([count.to(x.dtype), total, squares])).unbind(1)
        count, mean = counts.sum(), totals.sum() / counts.sum()
        squares = (parts + counts * (totals / counts.clamp(min=1) - mean) ** 2).sum()
    return mean, squares / (count - 1).clamp(min=1)
