"""Forwards without gradient over the rows of a rollout, before the first update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_rlhf.axes import check_output
from hf_rlhf.batch import Rollouts
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.reference import ReferencePolicy
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.training.device_phases import Phases
from hf_rlhf.training.losses import over_distributions
from hf_rlhf.training.micro_batches import Batching

if TYPE_CHECKING:
    from accelerate import Accelerator

OLD = {"logps": "old_logps", "entropy": "old_entropy"}
"""Statistics of the policy -> their names before the first update."""
Forward = Callable[[TokenBatch], dict[str, Tensor]]


@dataclass(kw_only=True)
class Forwards:
    """Compute old log-probs, reference log-probs, values and more, each only if something reads it."""

    algorithm: Algorithm
    actor_critic: ActorCritic
    reference: ReferencePolicy | None
    accelerator: Accelerator
    batching: Batching
    phases: Phases

    @property
    def takes_old_logps(self) -> bool:
        """True if the sampler's log-probs serve as the old ones: not if autocast or half precision rounds them."""
        whole = next(self.actor_critic.parameters()).dtype in (torch.float32, torch.float64)
        return self.algorithm.samples_old_logps and whole and self.accelerator.mixed_precision == "no"

    def __call__(self, rollouts: Rollouts, mask: Tensor, sampled: Tensor | None = None) -> dict[str, Tensor]:
        """Return name -> (n, T), 0 off the mask: old_logps, old_entropy, sum_sq_probs, values, ref_logps, and KLs over whole
        distributions.

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
        }
        compared = a.kl_over_distributions("rollout")
        if any(wanted.values()) or compared:

            def act(batch: TokenBatch) -> dict[str, Tensor]:
                measures = None
                with self.accelerator.autocast():
                    if compared and self.reference is not None:
                        measures = self.reference.measures(batch, over_distributions(compared, update=False))
                    found: dict[str, Tensor] = self.actor_critic(batch, **wanted, measures=measures)
                    return found

            with self.phases.forward(critic=wanted["values"], reference=bool(compared)):
                found = self._over_rows(act, rollouts, mask)
            if not wanted["logps"]:
                found.pop("logps", None)
            results |= {OLD.get(name, name): x for name, x in found.items()}
        if self.reference is not None:
            reference = self.reference

            def refer(batch: TokenBatch) -> dict[str, Tensor]:
                with self.accelerator.autocast():
                    return {"ref_logps": reference(batch)}

            with self.phases.forward(reference=True):
                results |= self._over_rows(refer, rollouts, mask)
            check_output("reference", a.reference, results["ref_logps"], mask, method="logps")
        return results

    def _over_rows(self, forward: Forward, rollouts: Rollouts, mask: Tensor) -> dict[str, Tensor]:
        """Run `forward` over micro-batches and restore the order of rows: name -> (n, T)."""
        prompts, completions = rollouts.prompt_ids, rollouts.completion_ids
        results: dict[str, Tensor] = {}
        for part in self.batching.cut(range(len(rollouts)), prompts, completions):
            width = max(len(completions[i]) for i in part)
            rows = self.batching.batch([prompts[i] for i in part], [completions[i] for i in part], mask[part, :width])
            for name, x in forward(rows).items():
                results.setdefault(name, torch.zeros_like(mask))[part, :width] = x.to(mask.dtype)
        return results
