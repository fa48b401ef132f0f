"""The rows of a rollout over several processes: what each process holds of those of the others.

An estimator or filter with `across_groups` gets the rows of every process. The others get those of their own process, which
holds whole groups: then only masks and numbers by row are gathered, which weights and mini-batches need.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_rlhf.axes import Filter, check_output
from hf_rlhf.batch import Credit, Scored
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.schedule import looking_across
from hf_rlhf.runtime.distributed import Reduce, gather_rows
from hf_rlhf.training.rollout_buffer import IN_TABLE_ALONE, SELECTS_BY, Collected, kept_for_steps, selection

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hf_rlhf.axes import AdvantageEstimator

Columns = dict[str, Tensor]


@dataclass
class RolloutTable:
    """Gather what is needed of the rows of all processes. One per process; all call each method together."""

    algorithm: Algorithm
    accelerator: Accelerator

    @cached_property
    def whole(self) -> bool:
        """True if every process holds the numbers by token of all rows."""
        return self.accelerator.num_processes == 1 or bool(looking_across(self.algorithm))

    def alone(self, plugin: AdvantageEstimator | Filter) -> bool:
        """Return whether a plugin gets the rows of its process alone."""
        return self.accelerator.num_processes > 1 and not plugin.across_groups

    def gather(self, rows: Columns, wide: Columns, narrow: Columns) -> tuple[Columns, Columns, Tensor]:
        """Return this process's rows, the table of all rows in the order of groups, and the places of the former in it.

        `wide` holds the numbers by token, (n, T), `narrow` those by row.
        """
        table = gather_rows(self.accelerator, wide if self.whole else {"mask": wide["mask"].bool()}, narrow)
        order, own = table["group_ids"].argsort(stable=True), narrow["group_ids"]
        found = torch.isin(table["group_ids"][order], own.unique()).nonzero().flatten()
        places = torch.empty_like(found).index_copy(0, own.argsort(stable=True), found)
        rows = rows | wide if self.accelerator.num_processes > 1 else rows
        return rows, {name: x[order] for name, x in table.items()}, places

    def columns(self, collected: Collected, alone: bool) -> Columns:
        """Return the numbers of this process's rows, or those of all rows."""
        if not alone:
            return collected.table
        return {name: x[collected.places] for name, x in collected.table.items()} | collected.rows

    def numbers(self, collected: Collected) -> tuple[Columns, Reduce]:
        """Return the numbers that this process holds, of all rows if it can be, and sums over those that hold the others."""
        return self.columns(collected, not self.whole), Reduce(None if self.whole else self.accelerator)

    def everyone(self, collected: Collected, x: Tensor) -> Tensor:
        """Return (N,) or (N, T) of all rows from the (n,) or (n, T) of each process's."""
        found = gather_rows(
            self.accelerator, {"x": x if x.dim() == 2 else x.unsqueeze(1)}, {"places": collected.places}
        )
        rows = torch.empty_like(found["x"]).index_copy(0, found["places"], found["x"])
        return rows if x.dim() == 2 else rows.squeeze(1)

    def keep(self, collected: Collected, chosen: Filter) -> Tensor:
        """Return which of all rows (N,) a filter keeps."""
        alone = self.alone(chosen)
        scored = collected.scored(self.columns(collected, alone), self.algorithm)
        keep = torch.ones(0, dtype=torch.bool, device=scored.mask.device)
        if len(scored.mask):
            keep = check_output("filters", chosen, chosen(scored), scored.mask)
        return self.everyone(collected, keep) if alone else keep

    def credit(self, collected: Collected) -> tuple[Scored, Credit, Reduce]:
        """Return the rows that the estimator got, what it returned, and sums over all that it was called for."""
        estimator = self.algorithm.advantages
        alone = self.alone(estimator)
        scored = collected.scored(self.columns(collected, alone), self.algorithm)
        returns = scored.mask if not alone or "values" in estimator.needs else None
        credit = Credit(advantages=scored.mask, returns=returns)
        if len(scored.mask):
            found = check_output("advantages", estimator, estimator(scored), scored.mask, inputs=vars(scored))
            credit = Credit.of(found)
        over = Reduce(self.accelerator if alone else None)
        masked = torch.tensor(int(credit.value_mask is not None), device=scored.mask.device)
        if alone and "values" in estimator.needs and over.sum(masked):
            credit.value_mask = scored.mask if credit.value_mask is None else credit.value_mask
        return scored, credit, over

    def share(self, collected: Collected, name: str, x: Tensor, alone: bool) -> None:
        """Put `x` (N, T), or with `alone` (n, T), into this process's rows, and into the table where it is read there."""
        if not alone:
            collected.table[name] = x
            collected.rows[name] = x[collected.places, : collected.rows["mask"].size(1)]
            return
        collected.rows[name] = x
        if self.whole or name in kept_for_steps(self.algorithm):
            collected.table[name] = self.everyone(collected, x)

    def select(self, collected: Collected) -> None:
        """Put what the policy loss selects by into the table, and what it selects of all rows into the rows."""
        loss, table = self.algorithm.policy_loss, collected.table
        if "selected" not in loss.needs:
            return
        for name in SELECTS_BY:
            if name in collected.rows and name not in table:
                table[name] = self.everyone(collected, collected.rows[name])
        if not loss.selects_per_step:
            mask = table["mask"].to(collected.rows["mask"].dtype)
            self.share(collected, "selected", selection(loss, table | {"mask": mask}), alone=False)

    def for_update(self, collected: Collected) -> Columns:
        """Return this process's rows without what estimators and filters alone read."""
        return {name: x for name, x in collected.rows.items() if name not in IN_TABLE_ALONE}
