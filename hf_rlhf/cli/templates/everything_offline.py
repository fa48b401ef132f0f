"""Optional members of a trainer without rollouts."""

from __future__ import annotations

from typing import Any

from hf_rlhf import Metric
from hf_rlhf.axes import Footprint, OfflineTrainer


class Everything(OfflineTrainer):
    """Members that `new --full` adds to a trainer; delete those that yours does not need."""

    metrics = (
        Metric(
            "row_loss",
            "nats per token",
            "loss of a held-out row, averaged over rows",
            when="evaluation",
            summary="min",
        ),
    )

    def footprint(self, adapter: bool) -> Footprint:
        """Return what the memory estimate needs to know."""
        return Footprint()

    def measure(self, trainer: Any, examples: Any) -> dict[str, float]:
        """Return metrics on held-out examples, equal on every process."""
        batches = (trainer._prepare_inputs(trainer.data_collator([row])) for row in examples)
        losses = [float(trainer.model(**batch).loss) for batch in batches]
        return {"row_loss": sum(losses) / len(losses)}
