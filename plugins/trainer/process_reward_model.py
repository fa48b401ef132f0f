"""Process reward model trained on labelled steps (arXiv:2305.20050, arXiv:2312.08935), with transformers' Trainer.

The loss is the cross entropy of good and bad at the token that ends each step, averaged over the steps of an optimizer step.
Departures: steps end with `delimiter`, the last one too, as `rewards.process_reward_model` reads them; labels are good or
bad, where arXiv:2305.20050 also has neutral ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import MinLen

from hf_rlhf import hookimpl
from hf_rlhf.axes import Materials, OfflineTrainer

from ._conversations import ids_in
from ._labels import UNLABELLED, token_trainer
from ._measures import of_labels
from ._metrics import OF_STEPS
from ._scores import of_tokens

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, Trainer


@dataclass(kw_only=True)
class ProcessRewardModelTrainer(OfflineTrainer):
    """Fits a token classifier with the outputs bad and good to labels of steps.

    Rows have `completions`, a list of steps, and `labels`, a list of as many booleans, and optionally `prompt`, a text or a
    conversation.
    """

    name = "process_reward_model"
    words = "process reward model: a token classifier of good and bad steps"
    head = "token"
    outputs: ClassVar[int] = 2
    rows: ClassVar[str] = "stepwise"
    reward: ClassVar[str] = "process_reward_model"
    metrics = OF_STEPS

    delimiter: Annotated[str, MinLen(1)] = "\n\n"
    """Text appended to each step, at whose end it is scored: the `delimiter` of `rewards.process_reward_model`."""

    def columns(self) -> set[str]:
        return {"completions", "labels"}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        steps, labels = row["completions"], row["labels"]
        self._check(steps, labels)
        if not steps:
            return None
        found = ids_in(tokenizer, row.get("prompt"), "".join(step + self.delimiter for step in steps))
        if found is None:
            return None
        ids, spans = found
        marks = [UNLABELLED] * len(ids)
        end = 0
        for step, label in zip(steps, labels, strict=True):
            end += len(step) + len(self.delimiter)
            place = _at(spans, end)
            if place is None:
                return None
            marks[place] = int(label)
        return {"input_ids": ids, "labels": marks}

    def _check(self, steps: Any, labels: Any) -> None:
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise ValueError(f"completions must be a list of texts, one per step, got {steps!r:.80}")
        if not isinstance(labels, list) or not all(label in (0, 1) for label in labels):
            raise ValueError(f"labels must be a list of true and false, one per step, got {labels!r:.80}")
        if len(labels) != len(steps):
            raise ValueError(f"labels must have one value per step ({len(steps)}), got {len(labels)}")
        for number, step in enumerate(steps, start=1):
            if not step.strip() or self.delimiter in step + self.delimiter[:-1]:
                raise ValueError(
                    f"step {number} must be a text without the delimiter {self.delimiter!r}, got {step!r:.60}: a reward "
                    "would see other steps. Set trainer.delimiter to what separates them"
                )

    def build(self, materials: Materials) -> Trainer:
        import torch
        from torch.nn.functional import cross_entropy

        return token_trainer(
            materials, lambda logits, labels: cross_entropy(logits, labels, reduction="none"), torch.long
        )

    def measure(self, trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
        pairs = [
            (x, float(label))
            for scores, labels in zip(of_tokens(trainer, list(examples["input_ids"])), examples["labels"], strict=True)
            for x, label in zip(scores, labels, strict=True)
            if label != UNLABELLED
        ]
        return of_labels("steps", [x for x, _ in pairs], [label for _, label in pairs])


def _at(spans: list[tuple[int, int] | None], end: int) -> int | None:
    """Return the index of the token with the character before `end`, else of the last one before it."""
    inside = [(place, span) for place, span in enumerate(spans) if span is not None]
    holding = [place for place, span in inside if span[0] < end <= span[1]]
    before = [place for place, span in inside if span[1] <= end]
    return holding[0] if holding else before[-1] if before else None


@hookimpl
def trainer() -> list[type[OfflineTrainer]]:
    return [ProcessRewardModelTrainer]
