"""Evaluation: roll out and score held-out prompts; verifiers give accuracy, pass@k and maj@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_rlhf.config.sections import Evaluation
from hf_rlhf.runtime.distributed import sum_over_processes
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.scoring.scorer import reference_column, total, totals
from hf_rlhf.training.intervals import interval

if TYPE_CHECKING:
    from hf_rlhf.batch import Prompt, Rollouts
    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.training.collector import Collector


@dataclass(kw_only=True)
class Evaluated:
    """Results of an evaluation, over all processes."""

    names: list[str]
    sums: Tensor
    """(P, names, 2) in float64: numerator and count of each metric by prompt; the metric is the quotient of their sums."""
    samples: list[dict[str, Any]]
    """The first completion of up to `SAMPLES` prompts of this process."""

    def column(self, name: str) -> Tensor:
        """Return numerator and count of a metric by prompt, (P, 2)."""
        return self.sums[:, self.names.index(name)]

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The metrics; `health/` are numbers of rows. Those that nothing counts for are left out."""
        found = {}
        for name, column in zip(self.names, self.sums.unbind(1), strict=True):
            numerator, count = (math.fsum(x.tolist()) for x in column.unbind(1))
            if name.startswith("health/"):
                found[name] = numerator
            elif count:
                found[name] = numerator / count
        return found

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each metric over prompts; none of counts, nor of what is known for a single prompt."""
        found = {name: interval(self.column(name), is_share(name)) for name in self.metrics}
        return {name: bounds for name, bounds in found.items() if bounds and not name.startswith("health/")}


SAMPLES = 8
"""Most samples of an evaluation."""


def is_share(name: str) -> bool:
    """Return whether a metric is a share of rows or prompts, between 0 and 1."""
    return name.rpartition("/")[2].startswith(("accuracy", "pass@", "maj@", "truncated_frac"))


@torch.no_grad()
def evaluate(
    collector: Collector,
    prompts: Sequence[Prompt],
    settings: Evaluation,
    keep: Callable[[list[dict[str, Any]]], Any] = lambda rows: None,
) -> Evaluated:
    """Roll out and score prompts, and return the metrics over all processes.

    `reward/<label>/mean` over the rows it applies to, `reward/total/mean`, `rollout/length/mean`, `rollout/truncated_frac`;
    `health/reward_error` and `_timeout` count rows whose scoring failed; for each verifier `accuracy` (and `<label>/accuracy`
    where there are several), `pass@k` and `maj@k`. The random numbers are the same each time, so that two evaluations differ by
    the policy alone. Without reward sources, lengths alone.

    An episode of several agents counts once, by the agent that was asked first. `keep` gets the rows of this process, as many at
    a time as are decoded together, with the columns of `row_types`.
    """
    accelerator, group, temperature = collector.accelerator, settings.num_generations, settings.temperature
    temperature = collector.algorithm.rollout.temperature if temperature is None else temperature
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    names = _names(collector, group)
    sums = torch.zeros(len(prompts), len(names), 2, dtype=torch.float64)
    samples: list[dict[str, Any]] = []
    rows = collector.algorithm.rollout.prompts * collector.algorithm.rollout.num_generations
    step = max(1, rows // (group * accelerator.num_processes))  # as many rows at a time as in training
    collector.actor_critic.eval()
    with collector.engine_awake(), collector.sampling.gathered():
        for start in range(0, len(mine), step):
            part = mine[start : start + step]
            place, process = (collector.seed, "evaluate"), (accelerator.process_index, start)
            seed = (*place, *process)
            with seeded(*seed):
                drawn = [prompts[i] for i in part]
                _, rollouts = collector.roll_out(drawn, list(part), group, temperature, place, process)
                found, table = _score(collector, _by_episode(rollouts), group, seed)
            for i, values in zip(part, found, strict=True):
                sums[i] = torch.tensor([values.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64)
            samples += table[::group][: max(0, SAMPLES - len(samples))]
            keep(table)
    if accelerator.num_processes > 1:
        flat = sum_over_processes(accelerator, sums.flatten().tolist())
        sums = torch.tensor(flat, dtype=torch.float64).view_as(sums)
    return Evaluated(names=names, sums=sums, samples=samples)


def row_types(algorithm: Algorithm) -> dict[str, type]:
    """Return the columns of an evaluation's rows, and the type of each; a value may be missing."""
    rewards = {f"reward/{label}": float for label in algorithm.labels()} | {"reward": float}
    reference = {"reference": str} if reference_column(algorithm.rewards) is not None else {}
    texts: dict[str, type] = {"prompt": str, "completion": str, **reference}
    return {**texts, **(rewards if algorithm.rewards else {}), "tokens": int, "truncated": bool}


def _by_episode(rollouts: Rollouts) -> Rollouts:
    """Return one row of each episode: that of the agent that was asked first."""
    ids = rollouts.episode_ids
    first = [i for i, episode in enumerate(ids) if i == 0 or ids[i - 1] != episode]
    return rollouts if len(first) == len(ids) else rollouts.select(first)


def _powers(group: int) -> list[int]:
    return [2**i for i in range(1, int(math.log2(group)) + 1)] if group > 1 else []


def _names(collector: Collector, group: int) -> list[str]:
    names = ["rollout/length/mean", "rollout/truncated_frac"]
    if collector.algorithm.rewards:
        names = ["health/reward_error", "health/reward_timeout", "reward/total/mean", *names]
    names += [f"reward/{label}/mean" for label in collector.algorithm.labels()]
    for prefix, _ in _verifiers(collector):
        names.append(f"{prefix}accuracy")
        names += [f"{prefix}pass@{k}" for k in _powers(group)]
        if group > 1:
            names.append(f"{prefix}maj@{group}")
    return names


def _verifiers(collector: Collector) -> list[tuple[str, str]]:
    """Return (prefix of its metrics, label) of each verifier; the first has no prefix."""
    algorithm = collector.algorithm
    labels = [x for x, source in zip(algorithm.labels(), algorithm.rewards, strict=True) if source.verifier]
    return [("" if i == 0 else f"{label}/", label) for i, label in enumerate(labels)]


def _score(
    collector: Collector, rollouts: Rollouts, group: int, seed: tuple[int | str, ...]
) -> tuple[list[dict[str, tuple[float, float]]], list[dict[str, Any]]]:
    """Return numerator and count of each metric by prompt, and the rows."""
    starts, lengths = range(0, len(rollouts), group), [sum(mask) for mask in rollouts.masks]
    truncated = [reason == "length" for reason in rollouts.finish_reasons]
    found: list[dict[str, tuple[float, float]]] = [
        {
            "rollout/length/mean": (sum(lengths[i : i + group]), group),
            "rollout/truncated_frac": (sum(truncated[i : i + group]), group),
        }
        for i in starts
    ]
    columns: dict[str, list[Any]] = {"prompt": rollouts.prompts, "completion": rollouts.completions}
    if (name := reference_column(collector.algorithm.rewards)) is not None:
        columns["reference"] = rollouts.column(name)
    if collector.algorithm.rewards:
        columns |= _reward(collector, rollouts, group, seed, found)
    columns |= {"tokens": lengths, "truncated": truncated}
    return found, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _reward(
    collector: Collector,
    rollouts: Rollouts,
    group: int,
    seed: tuple[int | str, ...],
    found: list[dict[str, tuple[float, float]]],
) -> dict[str, list[float | None]]:
    """Add the metrics of the reward sources to those of each prompt, and return the rewards of the rows."""
    asked = collector.scorer.ask(rollouts, *seed, counts=False)
    answers = {label: result.answers for label, result in asked.items()}
    scores = totals(answers, rollouts)
    rewards, valid = total(totals(collector.normalizer(answers, None), rollouts), collector.weights(), len(rollouts))
    failed = {
        kind: [failure.row // group for result in asked.values() for failure in result.failures if failure.kind == kind]
        for kind in ("error", "timeout")
    }
    for i, metrics in enumerate(found):
        own = slice(i * group, (i + 1) * group)
        metrics |= {f"health/reward_{kind}": (places.count(i), 0) for kind, places in failed.items()}
        metrics["reward/total/mean"] = (rewards[own][valid[own]].sum().item(), valid[own].sum().item())
        for label, x in scores.items():
            metrics[f"reward/{label}/mean"] = (x[own].nansum().item(), (~x[own].isnan()).sum().item())
        for prefix, label in _verifiers(collector):
            correct, known = (scores[label][own] == 1).double(), ~scores[label][own].isnan()
            metrics[f"{prefix}accuracy"] = (correct[known].sum().item(), known.sum().item())
            if not known.all():
                continue
            right = int(correct.sum())
            metrics |= {f"{prefix}pass@{k}": (pass_at_k(group, right, k), 1) for k in _powers(group)}
            if group > 1:
                votes = collector.scorer.final_answers(label, rollouts.turns()[own])
                metrics[f"{prefix}maj@{group}"] = (majority(votes, correct.tolist()), 1)
    numbers = {f"reward/{label}": x for label, x in scores.items()}
    numbers["reward"] = rewards.masked_fill(~valid, math.nan)
    return {name: [None if math.isnan(x) else x for x in values.tolist()] for name, values in numbers.items()}


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that k of n completions, drawn without replacement, hold a correct one (arXiv:2107.03374, equation 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(votes: Sequence[str | None], correct: Sequence[float]) -> float:
    """Return how correct the most frequent answer is: the mean over ties, 0 without any answer.

    Completions without an answer do not vote. Answers written differently are different votes.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    top = max(counts.values())
    winners = [vote for vote, count in counts.items() if count == top]
    grades = [max(c for v, c in zip(votes, correct, strict=True) if v == winner) for winner in winners]
    return sum(grades) / len(grades)
