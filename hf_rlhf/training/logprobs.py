"""Forwards without gradient over the rows of a rollout, before the first update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_rlhf.axes import check_output
from hf_rlhf.batch import Rollouts
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.references import RECIPE, keyed
from hf_rlhf.config.schedule import device_of
from hf_rlhf.modeling.lm_head import Measure
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.reference import ReferencePolicy
from hf_rlhf.modeling.router import ROUTED, experts_of_rows, experts_per_token
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.runtime.background import run_by_device
from hf_rlhf.training.device_phases import Phases
from hf_rlhf.training.micro_batches import Batching
from hf_rlhf.training.parallel import Parallel
from hf_rlhf.training.references import References, rows_of_kls

if TYPE_CHECKING:
    from accelerate import Accelerator

OLD = {"logps": "old_logps", "entropy": "old_entropy"}
"""Statistics of the policy -> their names before the first update."""
Forward = Callable[[TokenBatch, list[int]], dict[str, Tensor]]
"""(micro-batch, its rows) -> name -> (B, T)."""
Prompts = dict[str, list[list[int]]]
"""Key of a reference -> the prompts that it reads in place of the rows' own."""


@dataclass(kw_only=True)
class Forwards:
    """Compute old log-probs, reference log-probs, values and more, each only if something reads it."""

    algorithm: Algorithm
    actor_critic: ActorCritic
    references: References
    accelerator: Accelerator
    batching: Batching
    phases: Phases
    parallel: Parallel

    @property
    def reference(self) -> ReferencePolicy | None:
        """The recipe's reference, if anything reads it."""
        return self.references.scorers.get(RECIPE)

    @property
    def takes_old_logps(self) -> bool:
        """True if the sampler's log-probs serve as the old ones, by choice or because nothing rounds them."""
        if self.algorithm.update.old_logps == "sampler":
            return True
        whole = next(self.actor_critic.parameters()).dtype in (torch.float32, torch.float64)
        return self.algorithm.samples_old_logps and whole and self.accelerator.mixed_precision == "no"

    def __call__(
        self, rollouts: Rollouts, mask: Tensor, sampled: Tensor | None = None, prompts: Prompts | None = None
    ) -> dict[str, Tensor]:
        """Return name -> (n, T), 0 off the mask: old_logps, old_entropy, sum_sq_probs, values, ref_logps, KLs over whole
        distributions; (n, T, k) of a reference's likeliest tokens; and `ROUTED`, (n, L, E): the tokens of each row that go to
        each of E experts of L routers.

        `sampled` (n, T) are the sampler's log-probs, which serve as the old ones if `takes_old_logps`.
        """
        a = self.algorithm
        results: dict[str, Tensor] = {}
        taken = sampled is not None and self.takes_old_logps
        if taken and sampled is not None:
            results["old_logps"] = sampled
        wanted = {
            "logps": bool(a.readers_of_old_logps) and not taken,
            "values": "values" in a.needs,
            "entropy": "old_entropy" in a.needs,
            "sum_sq_probs": "sum_sq_probs" in a.needs,
            "router_logits": "routing_fractions" in a.needs,
        }
        results |= rows_of_kls(a, rollouts, mask)
        return results | self._run(rollouts, mask, wanted, prompts or {}, late=False)

    def after_rewards(self, rollouts: Rollouts, mask: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """Return the same of references whose prompts depend on the rewards."""
        wanted = dict.fromkeys(("logps", "values", "entropy", "sum_sq_probs"), False)
        return self._run(rollouts, mask, wanted, prompts, late=True)

    def _run(
        self, rollouts: Rollouts, mask: Tensor, wanted: dict[str, bool], prompts: Prompts, *, late: bool
    ) -> dict[str, Tensor]:
        """Run the policy for `wanted` and the references, those together with it that it is compared with; on several devices at
        the same time. `late`: those that need scores, else the others."""
        references, own = self.algorithm.references, self.accelerator.device
        keys = [key for key, use in references.items() if use.in_rollout and ("scores" in use.reference.needs) == late]
        compared = [key for key in keys if references[key].rollout]
        critic = device_of(self.algorithm.critic, own)
        apart = wanted["values"] and critic != own
        of_policy = wanted | {"values": wanted["values"] and not apart}
        works: list[tuple[torch.device, Callable[[], dict[str, Tensor]]]] = []
        if any(of_policy.values()) or compared:
            works.append((own, lambda: self._act(rollouts, mask, of_policy, compared, prompts)))
        if apart:
            alone = dict.fromkeys(wanted, False) | {"values": True}
            works.append((critic, lambda: self._act(rollouts, mask, alone, [], prompts)))
        for key in keys:
            if key not in compared:
                refer = partial(self._refer, key, rollouts, mask, prompts.get(key))
                works.append((device_of(references[key].reference.base, own), refer))
        results = {name: x for found in run_by_device(works) for name, x in found.items()}
        for key in keys:
            if (name := keyed("ref_logps", key)) in results:
                results[name] = self._known(key, results[name], rollouts, mask)
                check_output("reference", references[key].reference, results[name], mask, method="logps")
        self.parallel.reshard()
        return results

    def _act(
        self, rollouts: Rollouts, mask: Tensor, wanted: dict[str, bool], compared: list[str], prompts: Prompts
    ) -> dict[str, Tensor]:
        """Run policy or critic for `wanted`, together with the references that the policy is `compared` with."""

        def act(batch: TokenBatch, rows: list[int]) -> dict[str, Tensor]:
            kept: dict[str, Tensor] = {}
            measures: dict[str, Measure] = {}
            with self.accelerator.autocast():
                for key in compared:
                    own = batch if key not in prompts or not rows else batch.behind([prompts[key][i] for i in rows])
                    scores, of_key = self.references.score(key, own, compared=True)
                    kept, measures = kept | scores, measures | of_key
                found: dict[str, Tensor] = self.actor_critic(batch, **wanted, measures=measures or None)
            if "router_logits" in found:
                chosen = experts_per_token(self.actor_critic.policy.config)
                on = batch.place(torch.ones_like(batch.targets))
                found[ROUTED] = experts_of_rows(found.pop("router_logits"), on, chosen)
            return kept | found

        with self.phases.forward(critic=wanted["values"], references=self.references.labels(compared)):
            found = self._over_rows(act, rollouts, mask)
        if not wanted["logps"]:
            found.pop("logps", None)
        return {OLD.get(name, name): x for name, x in found.items()}

    def _refer(self, key: str, rollouts: Rollouts, mask: Tensor, prompts: list[list[int]] | None) -> dict[str, Tensor]:
        """Run one reference."""

        def refer(batch: TokenBatch, rows: list[int]) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                return self.references.score(key, batch, compared=False)[0]

        with self.phases.forward(references=self.references.labels([key])):
            return self._over_rows(refer, rollouts, mask, prompts)

    def _known(self, key: str, ref_logps: Tensor, rollouts: Rollouts, mask: Tensor) -> Tensor:
        """Replace what a reference says of tokens that it does not know by the policy's own log-probs: no KL there."""
        unknown = ref_logps.isnan()
        if not self.references.scorers[key].partial or not self.parallel.most(int(unknown.any())):
            return ref_logps

        def act(batch: TokenBatch, rows: list[int]) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                found: dict[str, Tensor] = self.actor_critic(batch)
                return found

        return ref_logps.where(~unknown, self._over_rows(act, rollouts, mask)["logps"])

    def _over_rows(
        self, forward: Forward, rollouts: Rollouts, mask: Tensor, prompts: list[list[int]] | None = None
    ) -> dict[str, Tensor]:
        """Run `forward` over micro-batches, behind other `prompts` if they are given, and restore the order of rows.

        Returns name -> (n, T) or (n, T, k).
        """
        own, completions, forks = rollouts.prompt_ids, rollouts.completion_ids, rollouts.forks or None
        results: dict[str, Tensor] = {}
        parts = self.batching.cut(range(len(rollouts)), prompts or own, completions, forks)
        short = self.parallel.most(len(parts)) - len(parts)
        for part in parts:
            width = max(len(completions[i]) for i in part)
            cuts = None if forks is None else [forks[i] for i in part]
            rows = self.batching.batch([own[i] for i in part], [completions[i] for i in part], mask[part, :width], cuts)
            if prompts is not None:
                rows = rows.behind([prompts[i] for i in part])
            for name, x in forward(rows, part).items():
                if name == ROUTED:
                    results.setdefault(name, x.new_zeros((len(mask), *x.shape[1:])))[part] = x
                    continue
                kind = mask.dtype if x.is_floating_point() else torch.int32
                empty = mask.new_zeros((*mask.shape, *x.shape[2:]), dtype=kind)
                results.setdefault(name, empty)[part, :width] = x.to(kind)
        for _ in range(short):
            forward(self.batching.empty(mask), [])
        return results
