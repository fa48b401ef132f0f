"""TRL's SFTTrainer, which may train an adapter on the head."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from ._whole_head import AdaptedHead


class HeadTrainer(AdaptedHead, SFTTrainer):
    """TRL's SFTTrainer with an adapter on the head computed from all logits."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss."""
        return super().compute_loss(self.called(model), *args, **kwargs)
