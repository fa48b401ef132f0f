"""Prompts to rollouts to rewards to KL to advantages: everything between two updates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_rlhf.algorithm import Algorithm
from hf_rlhf.axes import TrainedCritic
from hf_rlhf.batch import Completions, Credit, Rollouts, Scored
from hf_rlhf.buffer import Buffer, Collected, cut
from hf_rlhf.distributed import gather_rows
from hf_rlhf.losses import ESTIMATOR_GETS
from hf_rlhf.meters import Meters
from hf_rlhf.policy import ActorCritic, Policy, ReferencePolicy, token_batch
from hf_rlhf.prompts import Prompt, PromptStream
from hf_rlhf.scoring import RewardError, score, total
from hf_rlhf.seeding import seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Collector:
    """Fills the buffer. One per process; all processes call `collect` together."""

    algorithm: Algorithm
    policy: Policy
    actor_critic: ActorCritic
    reference: ReferencePolicy | None
    accelerator: Accelerator
    stream: PromptStream
    meters: Meters
    seed: int
    max_rows: int
    """Most rows of a forward without gradient."""
    tokens: float = 0.0
    """Completion tokens so far, over all processes."""
    unscored: int = 0
    """Rounds of prompts in a row in which no reward source scored a row."""

    @property
    def dtype(self) -> torch.dtype:
        """float64 for a float64 policy, else float32."""
        parameter = next(self.actor_critic.parameters())
        return torch.float64 if parameter.dtype == torch.float64 else torch.float32

    @torch.no_grad()
    def collect(self, index: int) -> Buffer:
        """Rollout number `index`: rolled out, scored, filtered and credited."""
        self.actor_critic.eval()
        mark = self.meters.mark()
        wanted, drawn = self.algorithm.rollout.prompts, 0
        parts: list[Collected] = []
        for attempt in range(1 + max((f.resample for f in self.algorithm.filters), default=0)):
            have = sum((len(part.table["group_ids"].unique()) for part in parts), 0)
            if have >= wanted:
                break
            prompts = self._draw(wanted - have)
            part = self._round(prompts, drawn, index, attempt)
            drawn += len(prompts)
            parts.append(self._keep(part))
        collected = self._first_groups(Collected.join(parts), wanted)
        self.meters.put("rollout/prompts_drawn", drawn)
        buffer = self._credit(index, collected)
        self._tell_plugins(self.meters.since(mark))
        return buffer

    def _tell_plugins(self, statistics: dict[str, float]) -> None:
        """Every plugin observes what was measured of this rollout alone, equal on every process; so no times."""
        told = {name: x for name, x in statistics.items() if not name.startswith("time/")}
        for _, plugin in self.algorithm.plugins():
            plugin.observe(told)

    def _draw(self, missing: int) -> list[Prompt]:
        """At least one prompt for each process."""
        processes = self.accelerator.num_processes
        return self.stream.next(
            -(-missing // processes) * processes if missing < self.algorithm.rollout.prompts else missing
        )

    def _round(self, prompts: Sequence[Prompt], first_group: int, index: int, attempt: int) -> Collected:
        """One round of prompts: completions, log-probs, rewards and in-reward KL, gathered into one table."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = prompts[rank::processes]
        group_ids = [first_group + rank + processes * i for i in range(len(mine))]
        with self.meters.time("rollout"), seeded(self.seed, "rollout", index, attempt, rank):
            completions, rollouts = self.roll_out(mine, group_ids, self.algorithm.rollout.num_generations)
        rows = {"mask": _padded(rollouts.masks, self.dtype).to(self.accelerator.device)}
        if "sampler_logps" in self.algorithm.needs:
            assert completions.logps is not None
            rows["sampler_logps"] = _padded(completions.logps, self.dtype).to(self.accelerator.device)
        with self.meters.time("forward"):
            rows |= self._forwards(rollouts, rows["mask"])
        with self.meters.time("reward"), seeded(self.seed, "reward", index, attempt, rank):
            scores = score(self._sources(), rollouts)
        return self._table(rollouts, rows, scores, self._logged(len(rollouts)))

    def _logged(self, rows: int) -> dict[str, list[Any]]:
        """Columns that reward sources logged beside their scores; their metrics go to the meters."""
        columns: dict[str, list[Any]] = {}
        for label, source in self._sources():
            extra, metrics = source.take_logs()
            for name, values in metrics.items():
                self.meters.add(f"reward/{label}/{name}", sum(values), len(values))
            for name, column in extra.items():
                if len(column) == rows:
                    columns[f"{label}/{name}"] = list(column)
                else:
                    logger.warning(
                        "reward %r logged %d values of %r for %d rows: dropped", label, len(column), name, rows
                    )
        return columns

    def roll_out(
        self, prompts: Sequence[Prompt], group_ids: list[int], group: int, temperature: float | None = None
    ) -> tuple[Completions, Rollouts]:
        """`group` completions of each prompt, and what the reward sources see of them."""
        with self.accelerator.autocast():
            completions = self.algorithm.rollout(self.policy, prompts, group, temperature=temperature)
        completions = self._checked(completions, len(prompts) * group)
        names = sorted({name for prompt in prompts for name in prompt.columns})
        repeated = [prompt for prompt in prompts for _ in range(group)]
        return completions, Rollouts(
            prompts=[prompt.prompt for prompt in repeated],
            completions=self.policy.tokenizer.batch_decode(completions.ids, skip_special_tokens=True),
            prompt_ids=[list(prompt.ids) for prompt in repeated],
            completion_ids=completions.ids,
            masks=completions.masks or [[1] * len(ids) for ids in completions.ids],
            finish_reasons=completions.finish_reasons,
            columns={name: [prompt.columns.get(name) for prompt in repeated] for name in names},
            group_ids=[i for i in group_ids for _ in range(group)],
        )

    def _checked(self, completions: Completions, rows: int) -> Completions:
        name = self.algorithm.rollout.name
        if len(completions.ids) != rows or len(completions.finish_reasons) != rows:
            raise ValueError(f"rollout={name} gave {len(completions.ids)} completions where {rows} were asked for")
        empty = [i for i, ids in enumerate(completions.ids) if not ids]
        if empty:
            raise ValueError(
                f"rollout={name} gave an empty completion in rows {empty}: the end-of-sequence token counts as a "
                "completion token, so give at least that"
            )
        for what in ("masks", "logps"):
            for i, values in enumerate(getattr(completions, what) or ()):
                if len(values) != len(completions.ids[i]):
                    raise ValueError(
                        f"rollout={name} gave {len(values)} {what} for the {len(completions.ids[i])} tokens of row {i}: one "
                        "per token is due, the end-of-sequence token included"
                    )
        if completions.logps is None and "sampler_logps" in self.algorithm.needs:
            raise ValueError(
                f"rollout={name} declares sampler_logps and gave none, and something needs them: give log-probs with every "
                "completion, or set rollout_correction.use=none"
            )
        return completions

    def _sources(self) -> list[tuple[str, Any]]:
        return list(zip(self.algorithm.labels(), self.algorithm.rewards, strict=True))

    def _forwards(self, rollouts: Rollouts, mask: Tensor) -> dict[str, Tensor]:
        """Old log-probs, reference log-probs and values of the rollout, each only if something reads it."""
        results: dict[str, Tensor] = {}
        old, values = bool(self.algorithm.readers_of_old_logps), "values" in self.algorithm.needs
        if old or values:

            def act(batch: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
                with self.accelerator.autocast():
                    return self.actor_critic(**batch, shape=shape, logps=old, values=values)

            found = self._over_rows(act, rollouts, mask)
            results |= {
                new: found[name] for name, new in (("logps", "old_logps"), ("values", "values")) if name in found
            }
        if self.reference is not None:
            reference = self.reference

            def refer(batch: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
                with self.accelerator.autocast():
                    return {"ref_logps": reference(batch, shape)}

            results |= self._over_rows(refer, rollouts, mask)
        return results

    def _over_rows(
        self, forward: Callable[..., dict[str, Tensor]], rollouts: Rollouts, mask: Tensor
    ) -> dict[str, Tensor]:
        """`forward` over micro-batches of similar length, put back in order: name -> (n, T)."""
        lengths = [len(p) + len(c) for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
        results: dict[str, Tensor] = {}
        for part in cut(
            list(range(len(rollouts))), lengths, self.algorithm.update.max_tokens_per_micro_batch, self.max_rows
        ):
            completions = [rollouts.completion_ids[i] for i in part]
            width = max(map(len, completions))
            pad = self.policy.tokenizer.pad_token_id
            batch = token_batch([rollouts.prompt_ids[i] for i in part], completions, mask[part, :width], pad)
            batch = {name: x.to(self.accelerator.device) for name, x in batch.items()}
            for name, x in forward(batch, (len(part), width)).items():
                results.setdefault(name, torch.zeros_like(mask))[part, :width] = x.to(mask.dtype)
        return results

    def _table(
        self, rollouts: Rollouts, rows: dict[str, Tensor], scores: dict[str, Tensor], logged: dict[str, list[Any]]
    ) -> Collected:
        device, mask = self.accelerator.device, rows["mask"]
        weights = self.weights()
        sums, valid = total(scores, weights)
        valid &= (mask > 0).any(1).cpu()
        token_rewards = at_last_token(sums.to(device, self.dtype), mask)
        for title, kl in self.algorithm.kl_in("reward"):
            measured = kl.measure(
                rows["old_logps"], rows["ref_logps"], mask, **self.algorithm.extras(kl.estimator, rows, ESTIMATOR_GETS)
            )
            penalty = kl.reward_penalty(measured)
            token_rewards = token_rewards - (penalty if penalty.dim() == 2 else at_last_token(penalty, mask))
            self.meters.add(f"kl/{title}/{kl.estimator.name}", measured.sum(), len(measured))
        narrow = {
            "group_ids": torch.tensor(rollouts.group_ids, device=device),
            "finished": torch.tensor([reason == "stop" for reason in rollouts.finish_reasons], device=device),
            "total": sums.to(device, self.dtype),
            "valid": valid.to(device),
        }
        narrow |= {f"score:{label}": x.to(device, self.dtype) for label, x in scores.items()}
        wide = {**rows, "token_rewards": token_rewards}
        table = gather_rows(self.accelerator, wide, narrow)
        order = table["group_ids"].argsort(stable=True)
        own = torch.isin(table["group_ids"][order], narrow["group_ids"].unique())
        collected = Collected(
            prompt_ids=rollouts.prompt_ids,
            completion_ids=rollouts.completion_ids,
            texts={
                "prompt": rollouts.prompts,
                "completion": rollouts.completions,
                "finish_reason": rollouts.finish_reasons,
            },
            rows=rows,
            table={name: x[order] for name, x in table.items()},
            places=own.nonzero().flatten(),
        )
        self._report_rewards(collected.table)
        self._count_unscored(collected.table)
        return collected.select(collected.table["valid"].bool())

    def _count_unscored(self, table: dict[str, Tensor]) -> None:
        """Warns of a round without a single score, and stops the run at the third in a row."""
        self.unscored = 0 if table["valid"].any() else self.unscored + 1
        if self.unscored:
            logger.warning("no reward source scored any of %d completions", len(table["valid"]))
        if self.unscored >= 3:
            labels = ", ".join(self.algorithm.labels())
            raise RewardError(
                f"no completion was scored in {self.unscored} rounds of prompts in a row: {labels} gave None or NaN for "
                "every row. Look at the column with the reference answers"
            )

    def _keep(self, part: Collected) -> Collected:
        """The rows that every filter keeps."""
        for title, chosen in self.algorithm.titled("filters"):
            if len(part.table["mask"]) == 0:
                break
            keep = chosen(self._scored(part))
            self.meters.put(f"filter/{title}/kept_frac", keep.float().mean().item())
            part = part.select(keep)
        return part

    def _first_groups(self, collected: Collected, wanted: int) -> Collected:
        groups = collected.table["group_ids"]
        return collected.select(torch.isin(groups, groups.unique()[:wanted]))

    def weights(self) -> dict[str, float]:
        """label -> weight of each reward source."""
        return {label: source.weight for label, source in self._sources()}

    def _scored(self, collected: Collected) -> Scored:
        return collected.scored(self.algorithm.labels(), self.weights())

    def _credit(self, index: int, collected: Collected) -> Buffer:
        """Advantages over all N rows, cut to this process's rows."""
        scored, rows = self._scored(collected), dict(collected.rows)
        width = rows["mask"].size(1)
        if len(scored.mask):
            credit = self.algorithm.advantages(scored)
            advantages = credit.advantages if isinstance(credit, Credit) else credit
            self._report_credit(scored, advantages, credit.returns if isinstance(credit, Credit) else None)
        else:
            credit, advantages = None, scored.mask
            self.meters.put("health/empty_rollout", 1)
        rows["advantages"] = advantages[collected.places, :width]
        if isinstance(self.algorithm.critic, TrainedCritic):
            returns = credit.returns if isinstance(credit, Credit) else scored.mask
            rows["returns"] = returns[collected.places, :width]
        for title, kl in self.algorithm.kl_in("advantage"):
            extras = self.algorithm.extras(kl.estimator, rows, ESTIMATOR_GETS)
            measured = kl.measure(rows["old_logps"], rows["ref_logps"], rows["mask"], **extras)
            self.meters.add(f"kl/{title}/{kl.estimator.name}", measured.sum(), len(measured))
            penalty = kl.advantage_penalty(measured)
            rows["advantages"] = (
                rows["advantages"] - (penalty if penalty.dim() == 2 else penalty.unsqueeze(1)) * rows["mask"]
            )
        if "sampler_logps" in self.algorithm.rollout_correction.needs:
            rows["correction"] = self.algorithm.rollout_correction(
                rows["old_logps"], rows["sampler_logps"], rows["mask"]
            )
        return Buffer(
            index=index,
            prompt_ids=collected.prompt_ids,
            completion_ids=collected.completion_ids,
            rows=rows,
            places=collected.places,
            mask=collected.table["mask"].bool(),
            group_ids=collected.table["group_ids"],
            extra={"texts": collected.texts, "numbers": self._numbers(collected)},
        )

    def _numbers(self, collected: Collected) -> dict[str, Tensor]:
        table, places = collected.table, collected.places
        numbers = {f"reward/{label}": table[f"score:{label}"][places] for label in self.algorithm.labels()}
        return {**numbers, "reward/total": table["total"][places]}

    def _report_rewards(self, table: dict[str, Tensor]) -> None:
        put, valid = self.meters.put, table["valid"].bool()
        for label in self.algorithm.labels():
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
        self.tokens += lengths.sum().item()

    def _report_credit(self, scored: Scored, advantages: Tensor, returns: Tensor | None) -> None:
        put, on = self.meters.put, scored.mask > 0
        _put_mean_std(put, "reward/after_kl", scored.returns())
        _put_mean_std(put, "advantage", advantages[on])
        put("advantage/min", advantages[on].min().item())
        put("advantage/max", advantages[on].max().item())
        if returns is not None and scored.values is not None:
            target, error = returns[on], returns[on] - scored.values[on]
            if target.var() > 0:
                put("value/explained_var", (1 - error.var() / target.var()).item())
            put("value/mean", scored.values[on].mean().item())


def at_last_token(x: Tensor, mask: Tensor) -> Tensor:
    """(n,) -> (n, T): `x` at the last position with mask 1 of its row, 0 elsewhere."""
    last = mask.size(1) - 1 - (mask > 0).int().flip(1).argmax(1)
    return torch.zeros_like(mask).scatter(1, last.unsqueeze(1), x.unsqueeze(1)) * (mask > 0)


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def _put_mean_std(put: Callable[[str, float], None], name: str, x: Tensor) -> None:
    if len(x):
        put(f"{name}/mean", x.mean().item())
        put(f"{name}/std", x.std(correction=1 if len(x) > 1 else 0).item())
