"""Evaluation: roll out and score held-out prompts; verifiers give accuracy, pass@k and maj@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_rlhf.config.sections import Evaluation
from hf_rlhf.runtime.distributed import sum_over_processes
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.scoring.scorer import total, totals

if TYPE_CHECKING:
    from hf_rlhf.batch import Prompt, Rollouts
    from hf_rlhf.training.collector import Collector


@torch.no_grad()
def evaluate(
    collector: Collector, prompts: Sequence[Prompt], settings: Evaluation
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return metrics over all processes, and samples of this process's rows.

    `reward/<label>/mean` over the rows it applies to, `reward/total/mean`, `rollout/length/mean`, `rollout/truncated_frac`;
    `health/reward_error` and `_timeout` count rows whose scoring failed; for each verifier `accuracy` (and `<label>/accuracy`
    where there are several), `pass@k` and `maj@k`. The random numbers are the same each time, so that two evaluations differ by
    the policy alone. Without reward sources, lengths alone.
    """
    accelerator, group = collector.accelerator, settings.num_generations
    mine = [prompts[i] for i in range(accelerator.process_index, len(prompts), accelerator.num_processes)]
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in _names(collector, group)}
    samples: list[dict[str, Any]] = []
    rows = collector.algorithm.rollout.prompts * collector.algorithm.rollout.num_generations
    step = max(1, rows // (group * accelerator.num_processes))  # as many rows at a time as in training
    collector.actor_critic.eval()
    with collector.engine_awake():
        for start in range(0, len(mine), step):
            part = mine[start : start + step]
            seed = (collector.seed, "evaluate", accelerator.process_index, start)
            with seeded(*seed):
                _, rollouts = collector.roll_out(part, list(range(len(part))), group, settings.temperature)
                samples += _add(sums, collector, rollouts, group, seed)[: max(0, 8 - len(samples))]
    flat = sum_over_processes(accelerator, [x for pair in sums.values() for x in pair])
    pairs = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(sums)}
    counts = {name: numerator for name, (numerator, _) in pairs.items() if name.startswith("health/")}
    return counts | {name: numerator / count for name, (numerator, count) in pairs.items() if count}, samples


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


def _add(
    sums: dict[str, list[float]], collector: Collector, rollouts: Rollouts, group: int, seed: tuple[int | str, ...]
) -> list[dict[str, Any]]:
    def add(name: str, value: float, count: float) -> None:
        sums[name][0] += value
        sums[name][1] += count

    add("rollout/length/mean", sum(map(sum, rollouts.masks)), len(rollouts))
    add("rollout/truncated_frac", rollouts.finish_reasons.count("length"), len(rollouts))
    samples = [
        {"prompt": rollouts.prompts[i], "completion": rollouts.completions[i]} for i in range(0, len(rollouts), group)
    ]
    if not collector.algorithm.rewards:
        return samples
    asked = collector.scorer.ask(rollouts, *seed, counts=False)
    answers = {label: found.answers for label, found in asked.items()}
    scores = totals(answers, rollouts)
    rewards, valid = total(totals(collector.normalizer(answers, None), rollouts), collector.weights(), len(rollouts))
    for kind in ("error", "timeout"):
        add(f"health/reward_{kind}", sum(found.count(kind) for found in asked.values()), 0)
    for label, x in scores.items():
        add(f"reward/{label}/mean", x.nansum().item(), (~x.isnan()).sum().item())
    add("reward/total/mean", rewards[valid].sum().item(), valid.sum().item())
    for prefix, label in _verifiers(collector):
        correct = (scores[label] == 1).double()
        known = ~scores[label].isnan()
        add(f"{prefix}accuracy", correct[known].sum().item(), known.sum().item())
        for row in range(0, len(rollouts), group):
            if not known[row : row + group].all():
                continue
            right = int(correct[row : row + group].sum())
            for k in _powers(group):
                add(f"{prefix}pass@{k}", pass_at_k(group, right, k), 1)
            if group > 1:
                votes = collector.scorer.final_answers(label, rollouts.turns()[row : row + group])
                add(f"{prefix}maj@{group}", majority(votes, correct[row : row + group].tolist()), 1)
    return [{**sample, "reward": rewards[i * group].item()} for i, sample in enumerate(samples)]


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
