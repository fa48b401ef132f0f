"""Forwards without gradient over the rows of a rollout: what is known of them before the first update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_rlhf.algorithm import Algorithm
from hf_rlhf.batch import Rollouts
from hf_rlhf.buffer import cut
from hf_rlhf.losses import DISTRIBUTION
from hf_rlhf.policy import ActorCritic, ReferencePolicy, token_batch

if TYPE_CHECKING:
    from accelerate import Accelerator

Forward = Callable[[dict[str, Tensor], tuple[int, int]], dict[str, Tensor]]


@dataclass(kw_only=True)
class Forwards:
    """Old log-probs, reference log-probs, values and more, each only if something reads it."""

    algorithm: Algorithm
    actor_critic: ActorCritic
    reference: ReferencePolicy | None
    accelerator: Accelerator
    pad: int
    max_rows: int

    def __call__(self, rollouts: Rollouts, mask: Tensor) -> dict[str, Tensor]:
        """name -> (n, T), 0 off the mask: old_logps, sum_sq_probs, values, ref_logps, KLs over whole distributions."""
        a = self.algorithm
        results: dict[str, Tensor] = {}
        wanted = {
            "logps": bool(a.readers_of_old_logps),
            "values": "values" in a.needs,
            "sum_sq_probs": "sum_sq_probs" in a.needs,
        }
        compared = a.kl_over_distributions("rollout")
        if any(wanted.values()) or compared:

            def act(batch: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
                measures = None
                with self.accelerator.autocast():
                    if compared and self.reference is not None:
                        named = {f"{DISTRIBUTION}{title}": (kl.estimator, False) for title, kl in compared}
                        measures = self.reference.measures(batch, named)
                    return self.actor_critic(**batch, shape=shape, **wanted, measures=measures)

            found = self._over_rows(act, rollouts, mask)
            results |= {"old_logps" if name == "logps" else name: x for name, x in found.items()}
            if not wanted["logps"]:
                results.pop("old_logps", None)
        if self.reference is not None:
            reference = self.reference

            def refer(batch: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
                with self.accelerator.autocast():
                    return {"ref_logps": reference(batch, shape)}

            results |= self._over_rows(refer, rollouts, mask)
        return results

    def _over_rows(self, forward: Forward, rollouts: Rollouts, mask: Tensor) -> dict[str, Tensor]:
        """`forward` over micro-batches of similar length, put back in order: name -> (n, T)."""
        lengths = [len(p) + len(c) for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
        results: dict[str, Tensor] = {}
        budget = self.algorithm.update.max_tokens_per_micro_batch
        for part in cut(list(range(len(rollouts))), lengths, budget, self.max_rows):
            completions = [rollouts.completion_ids[i] for i in part]
            width = max(map(len, completions))
            batch = token_batch([rollouts.prompt_ids[i] for i in part], completions, mask[part, :width], self.pad)
            batch = {name: x.to(self.accelerator.device) for name, x in batch.items()}
            for name, x in forward(batch, (len(part), width)).items():
                results.setdefault(name, torch.zeros_like(mask))[part, :width] = x.to(mask.dtype)
        return results
