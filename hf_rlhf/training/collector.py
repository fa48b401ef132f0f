"""From prompts to rollouts, rewards, KL and advantages: everything between two updates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_rlhf.axes import KLController, TrainedCritic, check_output
from hf_rlhf.batch import Completions, Prompt, Rollouts
from hf_rlhf.config.algorithm import Algorithm, places
from hf_rlhf.config.references import ROWS, drifts, statistics_for
from hf_rlhf.config.schedule import beside_forwards
from hf_rlhf.data.prompt_stream import PromptStream
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.metrics.rollout_statistics import (
    SCORED,
    given_totals,
    own_metrics,
    report_credit,
    report_drift,
    report_rewards,
)
from hf_rlhf.modeling.policy import ActorCritic, Policy
from hf_rlhf.modeling.router import ROUTED
from hf_rlhf.runtime.background import run_in_thread
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.scoring.answers import Answer, RewardError
from hf_rlhf.scoring.normalization import RewardNormalizer
from hf_rlhf.scoring.scorer import Scorer, SourceResult, place, total, totals
from hf_rlhf.training.dealing import dealt
from hf_rlhf.training.engine_weights import AwakeEngine
from hf_rlhf.training.environments.statistics import report_episodes
from hf_rlhf.training.environments.turns import turn_columns
from hf_rlhf.training.logprobs import Forwards, Prompts
from hf_rlhf.training.losses import at_last_token, correction_of, measured, penalty_of
from hf_rlhf.training.recording import Recorder
from hf_rlhf.training.references import scores_of
from hf_rlhf.training.rollout_buffer import Buffer, Collected, kept_for_steps
from hf_rlhf.training.rollout_table import RolloutTable
from hf_rlhf.training.sampling import Place, Sampling

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Collector:
    """Collect rollouts. One per process; all processes call `collect` together."""

    algorithm: Algorithm
    policy: Policy
    actor_critic: ActorCritic
    forwards: Forwards
    scorer: Scorer
    normalizer: RewardNormalizer
    accelerator: Accelerator
    stream: PromptStream
    meters: MetricAggregator
    recorder: Recorder
    seed: int
    tokens: float = 0.0
    """Completion tokens so far, over all processes."""
    _seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    """Groups and scores of the rows of each round of this rollout."""
    unscored: int = 0
    """Consecutive rounds of prompts in which no reward source scored a row."""

    @property
    def dtype(self) -> torch.dtype:
        """float64 for a float64 policy, else float32."""
        parameter = next(self.actor_critic.parameters())
        return torch.float64 if parameter.dtype == torch.float64 else torch.float32

    @torch.no_grad()
    def collect(self, index: int) -> Buffer:
        """Return rollout number `index`: sampled, scored, filtered and with advantages."""
        self.actor_critic.eval()
        mark, _ = self.meters.mark(), self._betas()
        wanted, drawn = self.algorithm.rollout.prompts, 0
        parts: list[Collected] = []
        self.stream.begin_rollout()
        self._seen = []
        with self.engine_awake():
            for attempt in range(1 + max((f.resample for f in self.algorithm.filters), default=0)):
                have = sum((len(part.table["prompt"].unique()) for part in parts), 0)
                if have >= wanted:
                    break
                prompts = self._draw(wanted - have)
                part = self._round(prompts, drawn, index, attempt)
                drawn += len(prompts)
                parts.append(self._keep(part))
        collected = self._first_groups(Collected.join(parts), wanted)
        self.meters.put("rollout/prompts_drawn", drawn)
        known, over = self.rows_of.numbers(collected)
        report_drift(self.meters.put, collected.table["mask"], known, drifts(self.algorithm), over)
        buffer = self._credit(index, collected)
        if self.stream.observed:
            drawn_as, scores = (torch.cat(column).tolist() for column in zip(*self._seen, strict=True))
            self.stream.observe(drawn_as, scores)
        self._observe(self.meters.since(mark))
        return buffer

    def deal(self, buffer: Buffer) -> Buffer:
        """Return the rows that this process updates on; each process gets as many tokens."""
        return dealt(buffer, self.algorithm, self.forwards.batching, self.accelerator)

    @cached_property
    def engine_awake(self) -> AwakeEngine:
        """Wakes the rollout engine, with the policy's weights, for all calls of one rollout or evaluation."""
        return AwakeEngine(self.algorithm.rollout, self.policy, self.accelerator, self.meters)

    def _observe(self, statistics: dict[str, float]) -> None:
        """Let every plugin observe the statistics of this rollout and of the updates before it. They are equal on every process,
        so times are left out."""
        observed = {name: x for name, x in statistics.items() if not name.startswith("time/")}
        observed |= self.meters.since_last_rollout(self.accelerator)
        for path, plugin in self.algorithm.plugins():
            if plugin is not self.algorithm.sampler:  # it observes rows and their scores
                plugin.observe(statistics_for(self.algorithm, path, observed))
        for title, beta in self._betas().items():
            self.meters.put(f"kl/{title}/beta", beta)
        for area, _, plugin in places(self.algorithm):
            for name, x in plugin.report().items():
                self.meters.put(f"{area}/{name}", x)

    def _betas(self) -> dict[str, float]:
        """Return the current beta of each KL that has a controller."""
        return {
            title: check_output("kl_controller", controller, controller(kl.beta), None)
            for title, kl in self.algorithm.titled("kl")
            if isinstance(controller := getattr(kl, "controller", None), KLController)
        }

    def _draw(self, missing: int) -> list[Prompt]:
        """Draw at least one prompt for each process."""
        processes = self.accelerator.num_processes
        return self.stream.next(
            -(-missing // processes) * processes if missing < self.algorithm.rollout.prompts else missing
        )

    def _round(self, prompts: Sequence[Prompt], first_group: int, index: int, attempt: int) -> Collected:
        """Roll out one round of prompts: completions, log-probs, rewards and in-reward KL, gathered into one table."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = prompts[rank::processes]
        group_ids = [first_group + rank + processes * i for i in range(len(mine))]
        where, group = (self.seed, "rollout", index, attempt), self.algorithm.rollout.num_generations
        with self.meters.time("rollout"), seeded(*where, rank):
            completions, rollouts = self.roll_out(mine, group_ids, group, place=where, process=(rank,))
        if self.algorithm.environment:
            report_episodes(self.meters, rollouts, self.sampling.waited, self.sampling.overridden)
        rows = {"mask": _padded(rollouts.masks, self.dtype).to(self.accelerator.device)}
        sampled = None
        if completions.logps is not None:
            sampled = _padded(completions.logps, self.dtype).to(self.accelerator.device)
            sampled = sampled.masked_fill(rows["mask"] == 0, 0.0)
        if self.algorithm.compares_sampler:
            assert sampled is not None
            rows["sampler_logps"] = sampled
        exact = sampled if completions.exact or self.algorithm.update.old_logps == "sampler" else None
        behind = self.forwards.references.prompts(rollouts)
        beside = run_in_thread(lambda: self._forward(rollouts, rows["mask"], exact, behind), self.accelerator.device)
        with beside as forward:
            if self.forwards.parallel.roots or not beside_forwards(self.algorithm, self.accelerator.device):
                forward.result()  # two models on a device would need the memory of both; shards are gathered in one order
            asked, scored_at = {}, None
            if self.algorithm.rewards:
                with self.meters.time("reward", "rewards"), seeded(self.seed, "reward", index, attempt, rank):
                    asked = self.scorer.ask(rollouts, self.seed, "reward", index, attempt, rank)
                scored_at = time.perf_counter()
            known, known_at = forward.result()
        rows |= known
        if scored_at is not None:
            self.meters.put("time/reward_wait_s", max(0.0, scored_at - known_at))
        logged, answers = self._logged(asked), {label: found.answers for label, found in asked.items()}
        if not self.algorithm.rollout.local and completions.versions:
            logged["weights"] = completions.versions
        if self.forwards.references.await_rewards:
            late = self.forwards.references.prompts(rollouts, scores_of(answers, rollouts, self.weights()))
            with self.meters.time("forward"):
                rows |= self.forwards.after_rewards(rollouts, rows["mask"], late)
            behind |= late
        if "greedy" in self.algorithm.needs:
            where = (self.seed, "greedy", index, attempt)
            with seeded(*where, rank):
                greedy = self._greedy(mine, group_ids, rollouts.group_ids, where, rank)
        else:
            greedy = None
        return self._table(rollouts, rows, answers, logged, greedy, behind)

    def _forward(
        self, rollouts: Rollouts, mask: Tensor, sampled: Tensor | None, behind: Prompts
    ) -> tuple[dict[str, Tensor], float]:
        """Return what the forwards give, and when they finished. Runs in a thread beside the reward sources, which keep the main
        thread (they may use signals) and the global generators: nothing here draws from them."""
        with self.meters.time("forward"):
            known = self.forwards(rollouts, mask, sampled, behind)
        return known, time.perf_counter()

    def _greedy(
        self, prompts: Sequence[Prompt], numbers: list[int], group_ids: list[int], place: Place, rank: int
    ) -> Tensor:
        """Return the total score of the greedy completion for the group of each row (n,); 0 where no source applies to it."""
        with self.meters.time("rollout"):
            _, rollouts = self.roll_out(prompts, numbers, 1, 0.0, place, (rank,))
        with self.meters.time("reward", "rewards"):
            asked = self.scorer.ask(rollouts, *place, rank, counts=False)
            answers = self.normalizer({label: found.answers for label, found in asked.items()}, None)
            sums, _ = total(totals(answers, rollouts), self.weights(), len(rollouts))
        place_of = {group: i for i, group in enumerate(rollouts.group_ids)}
        sums = torch.cat([sums, sums.new_zeros(1)])  # an agent that is not asked has no score
        return sums[[place_of.get(group, -1) for group in group_ids]]

    def _logged(self, asked: dict[str, SourceResult]) -> dict[str, list[Any]]:
        """Return the columns that reward sources logged; their metrics and failures go to the meters."""
        for label, found in asked.items():
            self.meters.add(f"time/reward/{label}_s", found.seconds, 1)
            for kind in ("error", "timeout"):
                self.meters.count(f"health/reward_{kind}", found.count(kind))
            for name, values in found.metrics.items():
                self.meters.add(f"reward/{label}/{name}", sum(values), len(values))
        return {f"{label}/{name}": column for label, found in asked.items() for name, column in found.columns.items()}

    @cached_property
    def roll_out(self) -> Callable[..., tuple[Completions, Rollouts]]:
        """Sample completions, for training and evaluation."""
        return self.sampling

    @cached_property
    def sampling(self) -> Sampling:
        """Sampling of completions, with its decoder."""
        return Sampling(algorithm=self.algorithm, policy=self.policy, accelerator=self.accelerator)

    @cached_property
    def rows_of(self) -> RolloutTable:
        """The exchange of rows with the other processes."""
        return RolloutTable(self.algorithm, self.accelerator)

    def _table(
        self,
        rollouts: Rollouts,
        rows: dict[str, Tensor],
        answers: dict[str, list[Answer]],
        logged: dict[str, list[Any]],
        greedy: Tensor | None,
        behind: Prompts,
    ) -> Collected:
        device, mask, weights, given = self.accelerator.device, rows["mask"], self.weights(), totals(answers, rollouts)
        answers = self.normalizer(answers, self.accelerator)
        scores = totals(answers, rollouts)
        sums, valid = total(scores, weights, len(rollouts))
        valid &= torch.tensor([any(row) for row in rollouts.masks])
        placed = [weights[label] * place(x, rollouts, self.sampling.text, mask.size(1)) for label, x in answers.items()]
        token_rewards = sum(placed, start=torch.zeros(mask.shape, dtype=torch.float64)).to(device, self.dtype)
        if self.algorithm.kl_in("reward"):
            rows["kl_penalties"] = self._kl_penalties(rows)
            token_rewards = token_rewards - rows["kl_penalties"]
        narrow = {"total": sums.to(device, self.dtype), "valid": valid.to(device), **self._named(rollouts)}
        narrow |= {f"score:{label}": x.to(device, self.dtype) for label, x in scores.items()}
        narrow |= {f"given:{x}": given[x].to(device, self.dtype) for x in scores if self.normalizer.changes(x)}
        if greedy is not None:
            narrow["greedy"] = greedy.to(device, self.dtype)
        if ROUTED in rows:
            narrow[ROUTED] = rows.pop(ROUTED)
        wide = {name: x for name, x in rows.items() if x.dim() == 2} | {"token_rewards": token_rewards}
        if "completion_ids" in self.algorithm.needs:
            wide["completion_ids"] = _padded(rollouts.completion_ids, torch.long).to(device)
        for name, numbers in turn_columns(rollouts, self.algorithm.needs).items():
            wide[name] = _padded(numbers, torch.long).to(device)
        rows, table, own = self.rows_of.gather(rows, wide, narrow)
        collected = Collected(
            prompt_ids=rollouts.prompt_ids,
            completion_ids=rollouts.completion_ids,
            prompts=behind,
            texts={
                "prompt": rollouts.prompts,
                "completion": rollouts.completions,
                "finish_reason": rollouts.finish_reasons,
                **self.recorder.references(rollouts),
                **logged,
            },
            rows=rows,
            table=table,
            places=own,
            forks=rollouts.forks,
        )
        reported = report_rewards(self.meters.put, collected.table, weights)
        self.scorer.count_answered(self.meters.add, rollouts, reported)
        self.tokens += reported["rollout/tokens"]
        self._count_unscored(len(table["valid"]), reported[SCORED])
        self.recorder.saw(rollouts, collected)
        self._seen.append((collected.table["prompt"], given_totals(collected.table, weights)))
        return self.recorder.select(collected, collected.table["valid"].bool(), "no reward source scored it")

    def _named(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Return which group, prompt, agent and episode each row (n,) belongs to, and whether it finished."""
        device, agents = self.accelerator.device, self.sampling.agents
        group_ids = torch.tensor(rollouts.group_ids, device=device)
        return {
            "group_ids": group_ids,
            "prompt": group_ids // agents,
            "agents": group_ids % agents,
            "episode_ids": torch.tensor(rollouts.episode_ids, device=device),
            "finished": torch.tensor([reason == "stop" for reason in rollouts.finish_reasons], device=device),
        }

    def _kl_penalties(self, rows: dict[str, Tensor]) -> Tensor:
        """Return what the KLs in the reward subtract from it, (n, T)."""
        mask, known = rows["mask"], {**rows, "logps": rows["old_logps"]}
        taken = torch.zeros_like(mask)
        for title, kl in self.algorithm.kl_in("reward"):
            value = measured(self.algorithm, title, kl, known, mask, self.meters)
            penalty = penalty_of(kl, "reward", value, known.get(f"{ROWS}{title}"))
            taken = taken + (penalty if penalty.dim() == 2 else at_last_token(penalty, mask))
        return taken

    def _count_unscored(self, rows: int, scored: float) -> None:
        """Warn of a round without a single score; raise `RewardError` at the third in a row."""
        self.unscored = 0 if scored else self.unscored + 1
        if self.unscored:
            logger.warning("no reward source scored any of %d completions", rows)
        if self.unscored >= 3:
            labels = ", ".join(self.algorithm.labels())
            raise RewardError(
                f"no completion was scored in {self.unscored} consecutive rounds of prompts: {labels} returned None or NaN for "
                "every row. Check the column with the reference answers"
            )

    def _keep(self, part: Collected, after_advantages: bool = False) -> Collected:
        """Apply the filters that run before (or after) the advantages are computed."""
        for title, chosen in self.algorithm.titled("filters"):
            if ("advantages" in chosen.needs) != after_advantages or len(part.table["mask"]) == 0:
                continue
            keep = self.rows_of.keep(part, chosen)
            self.meters.put(f"filter/{title}/kept_frac", keep.float().mean().item())
            part = self.recorder.select(part, keep, f"filter {title}")
        return part

    def _first_groups(self, collected: Collected, wanted: int) -> Collected:
        prompts = collected.table["prompt"]
        return self.recorder.select(
            collected, torch.isin(prompts, prompts.unique()[:wanted]), "more groups than needed"
        )

    def weights(self) -> dict[str, float]:
        """Return label -> weight of each reward source."""
        sources = zip(self.algorithm.labels(), self.algorithm.rewards, strict=True)
        return {label: source.weight for label, source in sources}

    def _credit(self, index: int, collected: Collected) -> Buffer:
        """Compute advantages; the buffer keeps this process's rows."""
        a, filled = self.algorithm, len(collected.table["mask"]) > 0
        scored, credit, over = self.rows_of.credit(collected)
        alone = over.accelerator is not None
        if filled:
            report_credit(self.meters.put, scored, credit, over)
            for name, total, count in own_metrics(scored, credit) if alone else ():
                self.meters.add(name, total, count)
        else:
            self.meters.put("health/empty_rollout", 1)
        advantages = credit.advantages
        if isinstance(a.critic, TrainedCritic) and credit.returns is not None:
            self.rows_of.share(collected, "returns", credit.returns, alone)
            if credit.value_mask is not None:
                self.rows_of.share(collected, "value_mask", credit.value_mask, alone)
        if a.kl_in("advantage"):
            advantages = advantages - self._advantage_penalties(self.rows_of.columns(collected, alone))
        self.rows_of.share(collected, "advantages", advantages, alone)
        self.rows_of.select(collected)
        self.recorder.credited(collected)
        collected = self._keep(collected, after_advantages=True)
        table, rows = collected.table, self.rows_of.for_update(collected)
        if filled and not len(table["mask"]):
            self.meters.put("health/empty_rollout", 1)
        if "sampler_logps" in a.rollout_correction.needs and not a.corrects_in_loss:
            rows["correction"] = correction_of(a, rows, rows["mask"], self.meters)
        return Buffer(
            index=index,
            prompt_ids=collected.prompt_ids,
            completion_ids=collected.completion_ids,
            prompts=collected.prompts,
            forks=collected.forks,
            rows=rows,
            places=collected.places,
            mask=table["mask"].bool(),
            group_ids=table["group_ids"],
            prompt=table["prompt"],
            total_score=table["total"],
            table={name: table[name] for name in kept_for_steps(a) if name in table},
            extra={"texts": collected.texts, "numbers": self._numbers(collected)},
        )

    def _advantage_penalties(self, table: dict[str, Tensor]) -> Tensor:
        """Return what the KLs in the advantage subtract from it, (N, T)."""
        mask, known = table["mask"], {**table, "logps": table["old_logps"]}
        taken = torch.zeros_like(mask)
        for title, kl in self.algorithm.kl_in("advantage"):
            value = measured(self.algorithm, title, kl, known, mask, self.meters)
            penalty = penalty_of(kl, "advantage", value, known.get(f"{ROWS}{title}"))
            taken = taken + (penalty if penalty.dim() == 2 else penalty.unsqueeze(1)) * mask
        return taken

    def _numbers(self, collected: Collected) -> dict[str, Tensor]:
        table, places = collected.table, collected.places
        labels = self.algorithm.labels()
        numbers = {f"reward/{label}": table[f"score:{label}"][places] for label in labels}
        return {**numbers, **({"reward/total": table["total"][places]} if labels else {})}


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
