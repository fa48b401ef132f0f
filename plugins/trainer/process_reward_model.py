"""A process reward model from labelled steps (arXiv:2305.20050, arXiv:2312.08935), on transformers' Trainer.

Cross entropy of good and bad at the token that ends each step, averaged over the steps of an optimizer step. Departures: a step
is what `delimiter` ends, and the last one is followed by it too, as `rewards.process_reward_model` reads it; labels are good or
bad, where arXiv:2305.20050 has neutral ones besides.
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
    """A token classifier with the outputs bad and good, fitted to labels of steps.

    Rows have `completions`, a list of steps, and `labels`, a list of as many truth values; `prompt`, a text or a conversation,
    stands before them where there is one.
    """

    name = "process_reward_model"
    head = "token"
    outputs: ClassVar[int] = 2
    rows: ClassVar[str] = "stepwise"
    reward: ClassVar[str] = "process_reward_model"
    metrics = OF_STEPS

    delimiter: Annotated[str, MinLen(1)] = "\n\n"
    """What is put behind each step, and where it is judged: the `delimiter` of `rewards.process_reward_model`."""

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
            raise ValueError(f"completions is {steps!r:.80}; a list of texts is due, one for each step")
        if not isinstance(labels, list) or not all(label in (0, 1) for label in labels):
            raise ValueError(f"labels is {labels!r:.80}; a list of true and false is due, one for each step")
        if len(labels) != len(steps):
            raise ValueError(f"{len(steps)} steps have {len(labels)} labels; each step needs one")
        for number, step in enumerate(steps, start=1):
            if not step.strip() or self.delimiter in step + self.delimiter[:-1]:
                raise ValueError(
                    f"step {number} is {step!r:.60}: a step holds text and not the delimiter {self.delimiter!r}, or a reward "
                    "would see other steps; set trainer.delimiter to what separates them"
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
    """The place of the token that holds the character before `end`, else of the last one before it."""
    inside = [(place, span) for place, span in enumerate(spans) if span is not None]
    holding = [place for place, span in inside if span[0] < end <= span[1]]
    before = [place for place, span in inside if span[1] <= end]
    return holding[0] if holding else before[-1] if before else None


@hookimpl
def trainer() -> list[type[OfflineTrainer]]:
    return [ProcessRewardModelTrainer]
