"""A reward model of tokens from labels of spans (dense rewards after arXiv:2306.01693), on transformers' Trainer.

At each labelled token the binary cross entropy of its label, or the squared error, averaged over the labelled tokens of an
optimizer step. Departures: one output in place of classes of errors, and labels of tokens as well as of spans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Materials, OfflineTrainer

from ._conversations import ids_in
from ._labels import UNLABELLED, token_trainer
from ._measures import of_labels, of_values
from ._metrics import OF_SPANS
from ._scores import of_tokens

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, Trainer


@dataclass(kw_only=True)
class TokenRewardModelTrainer(OfflineTrainer):
    """A token classifier with one output, fitted to a number for each token of a completion.

    Rows have `completion`, a text, and `spans`, a list of {start, end, label} in characters of it, or `labels`, a list of one
    number (or null) for each of its tokens; `prompt` stands before it where there is one. A token has the label of the span
    that holds its last character, and none where no span does.
    """

    name = "token_reward_model"
    head = "token"
    rows: ClassVar[str] = "spans"
    reward: ClassVar[str] = "token_reward_model"
    metrics = OF_SPANS

    loss: Literal["binary_cross_entropy", "squared_error"] = "binary_cross_entropy"
    """Labels from 0 to 1, of which the output is the log-odds; or any numbers, which are the output."""

    def columns(self) -> set[str]:
        return {"completion"}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        text = row["completion"]
        if not isinstance(text, str):
            raise ValueError(f"completion is {text!r:.80}; a text is due")
        found = ids_in(tokenizer, row.get("prompt"), text)
        if found is None:
            return None
        ids, spans = found
        if row.get("spans") is not None:
            known = [None if span is None else self._label(row["spans"], span[1] - 1, text) for span in spans]
        else:
            known = self._of_tokens(row.get("labels"), spans)
        for label in known:
            self._check(label)
        if all(label is None for label in known):
            return None
        return {"input_ids": ids, "labels": [float(UNLABELLED) if label is None else float(label) for label in known]}

    def _label(self, spans: Sequence[Mapping[str, Any]], place: int, text: str) -> float | None:
        """The label of the character at `place`."""
        labels = []
        for span in spans:
            if not isinstance(span, Mapping) or not {"start", "end", "label"} <= span.keys():
                raise ValueError(f"a span is {span!r:.60}; {{start, end, label}} is due")
            if not 0 <= span["start"] < span["end"] <= len(text):
                raise ValueError(f"a span is {span!r:.60}; it must lie within the completion's {len(text)} characters")
            if span["start"] <= place < span["end"]:
                labels.append(span["label"])
        if len(labels) > 1:
            raise ValueError(f"spans overlap at character {place}; each character has one label at most")
        return labels[0] if labels else None

    def _of_tokens(self, labels: Any, spans: Sequence[Any]) -> list[float | None]:
        places = [place for place, span in enumerate(spans) if span is not None]
        if not isinstance(labels, list) or len(labels) != len(places):
            given = f"{len(labels)} labels" if isinstance(labels, list) else f"labels {labels!r:.40}"
            raise ValueError(
                f"the completion has {len(places)} tokens and {given}: a list of one number or null for each is due, or "
                "spans of {start, end, label}"
            )
        known: list[float | None] = [None] * len(spans)
        for place, label in zip(places, labels, strict=True):
            known[place] = label
        return known

    def _check(self, label: Any) -> None:
        if label is None:
            return
        if not isinstance(label, int | float) or not math.isfinite(label) or label == UNLABELLED:
            raise ValueError(f"a label is {label!r}; a finite number is due, not {UNLABELLED}, or null for none")
        if self.loss == "binary_cross_entropy" and not 0 <= label <= 1:
            raise ValueError(f"a label is {label!r}; from 0 to 1 is due, or set trainer.loss=squared_error")

    def build(self, materials: Materials) -> Trainer:
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

        compare = binary_cross_entropy_with_logits if self.loss == "binary_cross_entropy" else mse_loss

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return compare(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")

        wide = torch.float64 if materials.model.dtype == torch.float64 else torch.float32
        return token_trainer(materials, loss, wide)

    def measure(self, trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
        pairs = [
            (x, label)
            for scores, labels in zip(of_tokens(trainer, list(examples["input_ids"])), examples["labels"], strict=True)
            for x, label in zip(scores, labels, strict=True)
            if label != UNLABELLED
        ]
        found, wanted = [x for x, _ in pairs], [label for _, label in pairs]
        measured = of_values if self.loss == "squared_error" else of_labels
        return measured("tokens", found, wanted)


@hookimpl
def trainer() -> list[type[OfflineTrainer]]:
    return [TokenRewardModelTrainer]
