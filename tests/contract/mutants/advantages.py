"""Wrong advantage estimators, baselines and filters; see `base`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rlhf.axes import Baseline, Filter
from hf_rlhf.batch import Credit, Scored
from tests.contract.mutants.base import Estimator, Mutant


class OffMask(Estimator):
    """Leaves the mask out: every padding token gets an advantage."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.returns()[:, None].expand(scored.mask.shape)


class PerRow(Estimator):
    """Gives one number per row."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.returns()


class Single(Estimator):
    """Falls back to float32."""

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.returns()[:, None] * scored.mask).float()


class Width(Estimator):
    """Divides by the padded width, not by the length."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.returns()[:, None] * scored.mask / scored.mask.shape[1]


class PlainMean(Estimator):
    """Whitens with the mean over every column, padding included (NovaSky-AI/SkyRL#1305)."""

    across_groups = True

    def __call__(self, scored: Scored) -> Tensor:
        advantages = scored.returns()[:, None] * scored.mask
        variance = ((advantages - advantages.mean()) ** 2 * scored.mask).sum() / scored.mask.sum().clamp(min=1)
        return (advantages - advantages.mean()) * (variance + 1e-8).rsqrt() * scored.mask


class PaddingIsReal(Estimator):
    """Counts the tokens that are not the padding token, tool output among them (huggingface/trl#4974)."""

    needs = frozenset({"completion_ids"})

    def __call__(self, scored: Scored) -> Tensor:
        assert scored.completion_ids is not None
        length = (scored.completion_ids != 0).sum(1).clamp(min=1)
        return (scored.returns() / length)[:, None] * scored.mask


class ByPosition(Estimator):
    """Takes each two neighbours for a group, whatever their ids (areal-project/AReaL#1419)."""

    needs = frozenset({"groups"})

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        if len(returns) % 2:
            returns = torch.cat([returns, returns[-1:]])
        means = returns.view(-1, 2).mean(1).repeat_interleave(2)
        return (returns - means)[: len(scored.mask), None] * scored.mask


class BatchStatistics(Estimator):
    """Takes mean and deviation of the whole rollout for the group's (THUDM/slime#1414)."""

    needs = frozenset({"groups"})

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        std = returns.std(correction=1 if len(returns) > 1 else 0)
        return ((returns - returns.mean()) / (std + 1e-4))[:, None] * scored.mask


class Standardised(Estimator):
    """Divides by a deviation that may be 0."""

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        return ((returns - scored.group_mean(returns)) / scored.group_std(returns))[:, None] * scored.mask


class Residue(Estimator):
    """Takes the rounding error of equal rewards for a deviation (NVIDIA-NeMo/RL#4161)."""

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        deviation = returns - scored.group_mean(returns)
        std = (scored.group_sum(deviation**2) / (scored.group_size() - 1).clamp(min=1)).sqrt()
        return torch.where(std > 0, deviation / std.clamp(min=1e-12), 0.0)[:, None] * scored.mask


class BesselAlone(Estimator):
    """Divides by G - 1, also where a group has one row left (radixark/miles#1573)."""

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        rest = (scored.group_sum(returns) - returns) / (scored.group_size() - 1)
        return (returns - rest)[:, None] * scored.mask


class BySource(Estimator):
    """Normalises each source and lets a missing score spread (modelscope/ms-swift#8123)."""

    needs = frozenset({"groups", "scores"})

    def __call__(self, scored: Scored) -> Tensor:
        assert scored.scores is not None
        centred = [score - scored.group_mean(score) for score in scored.scores.values()]
        return torch.stack(centred).sum(0)[:, None] * scored.mask


class ByLabel(Estimator):
    """Computes with the group's number."""

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.group_ids[:, None] * scored.mask).to(scored.mask.dtype)


class EveryStep(Estimator):
    """Discounts at every column, tool output and padding included (radixark/miles#1827)."""

    def __call__(self, scored: Scored) -> Tensor:
        later, advantages = torch.zeros_like(scored.mask[:, 0]), torch.zeros_like(scored.mask)
        for t in reversed(range(scored.mask.shape[1])):
            later = scored.token_rewards[:, t] + 0.9 * later
            advantages[:, t] = later
        return advantages * scored.mask


class Divided(Estimator):
    """Discounts without a loop, by dividing by gamma^t: what is left of late rewards is rounding in float32."""

    def __call__(self, scored: Scored) -> Tensor:
        powers = 0.05 ** (scored.mask.cumsum(1) - 1).clamp(min=0)
        discounted = scored.token_rewards * powers
        later = discounted.sum(1, keepdim=True) - discounted.cumsum(1) + discounted
        return later / powers * scored.mask


class Bootstrapped(Estimator):
    """Takes the critic's value of a masked token for the next state's (alibaba/ROLL#447)."""

    needs = frozenset({"values"})

    def __call__(self, scored: Scored) -> Credit:
        assert scored.values is not None
        following = torch.cat([scored.values[:, 1:], torch.zeros_like(scored.values[:, :1])], 1)
        advantages = (scored.token_rewards + following - scored.values) * scored.mask
        return Credit(advantages=advantages, returns=(advantages + scored.values) * scored.mask)


class NoTargets(Estimator):
    """Needs values and gives the critic no targets."""

    needs = frozenset({"values"})


class PerProcess(Estimator):
    """Whitens with the statistics of its own process (THUDM/slime#2235)."""

    across_groups = True

    def __call__(self, scored: Scored) -> Tensor:
        world, rank = 1, 0
        if torch.distributed.is_initialized():
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        own = scored.returns()[rank::world]
        return (scored.returns() - own.mean())[:, None] * scored.mask


class Collective(Estimator):
    """Sums over the processes what the core has gathered already."""

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(returns)
        return returns[:, None] * scored.mask


class InPlace(Estimator):
    """Writes into the token rewards."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.token_rewards.mul_(2)


class Random(Estimator):
    """Draws random numbers."""

    def __call__(self, scored: Scored) -> Tensor:
        torch.rand(1)
        return scored.token_rewards * scored.mask


class Undeclared(Estimator):
    """Reads values that it does not need: there where another plugin asks for them, missing elsewhere."""

    def __call__(self, scored: Scored) -> Tensor:
        baseline = 0.0 if scored.values is None else scored.values
        return (scored.returns()[:, None] - baseline) * scored.mask


class Unguarded(Estimator):
    """Reads the reference's log-probs and needs nothing."""

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.token_rewards - 0.1 * scored.ref_logps) * scored.mask  # type: ignore[operator]


class FlatBaseline(Baseline):
    """Gives one number for all rows."""

    name = "wrong"

    def __call__(self, scored: Scored) -> Tensor:
        return scored.returns().mean()


class Keep(Filter):
    """Keeps what was not cut off, to be made wrong."""

    name = "wrong"

    def __call__(self, scored: Scored) -> Tensor:
        assert scored.finished is not None
        return scored.finished


class Numbers(Keep):
    """Gives numbers instead of booleans."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.mask.max(1).values


class EveryOther(Keep):
    """Drops rows by their place."""

    def __call__(self, scored: Scored) -> Tensor:
        return torch.arange(len(scored.mask)) % 2 == 0


class NearlyFlat(Keep):
    """Finds groups without signal by a deviation of exactly 0."""

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        deviation = returns - scored.group_mean(returns)
        return scored.group_sum(deviation**2) > 0


MUTANTS = [
    Mutant(OffMask, "mask", "up to .* Multiply by the mask last"),
    Mutant(PerRow, "shape", r"shape \(9, 8\), got \(9,\)"),
    Mutant(Single, "shape", "must be torch.float64 for torch.float64 input, got torch.float32"),
    Mutant(Width, "padding", "padding were added", ("tools",)),
    Mutant(PlainMean, "padding", "Count with the mask", ("tools",)),
    Mutant(PaddingIsReal, "tools", "Skip it"),
    Mutant(ByPosition, "order", "Find a row's group by group_ids", ("prompts", "processes")),
    Mutant(BatchStatistics, "prompts", "across_groups = True"),
    Mutant(Standardised, "equal", "not finite for equal rewards", ("single",)),
    Mutant(Residue, "equal", "standard deviation is rounding error"),
    Mutant(BesselAlone, "single", "not finite for one row per group"),
    Mutant(BySource, "nan", "does not apply"),
    Mutant(ByLabel, "labels", "groups were renumbered"),
    Mutant(EveryStep, "tools", "Skip it"),
    Mutant(Divided, "float32", "float32 must be accurate enough"),
    Mutant(Bootstrapped, "off", "values off the mask changed", ("tools",)),
    Mutant(NoTargets, "shape", "returns no returns"),
    Mutant(PerProcess, "processes", "process 1 of 2"),
    Mutant(Collective, "processes", "calls torch.distributed"),
    Mutant(InPlace, "pure", "changes its input token_rewards"),
    Mutant(Random, "pure", "global random generator"),
    Mutant(Undeclared, "needs", "reads fields that it does not need"),
    Mutant(Unguarded, "needs", "Name in `needs` what it reads"),
    Mutant(FlatBaseline, "shape", "must return"),
    Mutant(Numbers, "shape", "must be torch.bool"),
    Mutant(EveryOther, "order", "rows were shuffled", ("processes",)),
    Mutant(NearlyFlat, "equal", "standard deviation is rounding error"),
]
