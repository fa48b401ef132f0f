"""Scores of held-out rows by the current model, split over the processes and gathered on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..rewards._models.batches import Row, scores_of

if TYPE_CHECKING:
    from transformers import Trainer


def of_texts(trainer: Trainer, rows: Sequence[list[int]]) -> list[float]:
    """Return the output of a sequence classifier for each row of tokens."""
    return _of_rows(trainer, rows, index=0)


def of_tokens(trainer: Trainer, rows: Sequence[list[int]]) -> list[list[float]]:
    """Return for each token the output of a token classifier, or the log-odds of the second of two."""
    model: Any = trainer.model
    return _of_rows(trainer, rows, index=model.config.num_labels - 1)


def own_places(trainer: Trainer, count: int) -> list[int]:
    """Return which of `count` rows this process evaluates.

    Every process has equally many, so that sharded models run equally many forwards; the last row may be another's too.
    """
    processes, own = trainer.args.world_size, trainer.args.process_index
    return [min(own + processes * i, count - 1) for i in range(-(-count // processes))]


def _of_rows(trainer: Trainer, rows: Sequence[list[int]], index: int) -> list[Any]:
    places = own_places(trainer, len(rows))
    batch_size = trainer.args.per_device_eval_batch_size
    given = [Row(list(rows[place]), None, False) for place in places]
    value: Any = "logit" if index == 0 else "log_odds"
    scores = scores_of(trainer.model, given, batch_size, None, index, value)
    found = list(zip(places, scores, strict=True))
    if trainer.args.world_size > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    scored = dict(found)
    return [scored[place] for place in range(len(rows))]
