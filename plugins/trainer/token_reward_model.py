"""Token reward model trained on labels of spans (dense rewards after arXiv:2306.01693), with transformers' Trainer.

The loss is the binary cross entropy or the squared error at each labelled token, averaged over those of an optimizer step.
Departures: one output instead of error classes, and labels of tokens as well as of spans.
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
    """Fits a token classifier with one output to a number for each token of a completion.

    Rows have `completion`, a text, and `spans`, a list of {start, end, label} in characters of it, or `labels`, a list of one
    number (or null) per token, and optionally `prompt`. A token has the label of the span that contains its last character,
    if there is one.
    """

    name = "token_reward_model"
    words = "token reward model: a classifier with a score for each token"
    head = "token"
    rows: ClassVar[str] = "spans"
    reward: ClassVar[str] = "token_reward_model"
    metrics = OF_SPANS

    loss: Literal["binary_cross_entropy", "squared_error"] = "binary_cross_entropy"
    """`binary_cross_entropy`: labels in [0, 1], whose log-odds are the output; `squared_error`: any numbers."""

    def columns(self) -> set[str]:
        return {"completion"}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        text = row["completion"]
        if not isinstance(text, str):
            raise ValueError(f"completion must be a text, got {text!r:.80}")
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
        """Return the label of the character at `place`, or None."""
        labels = []
        for span in spans:
            if not isinstance(span, Mapping) or not {"start", "end", "label"} <= span.keys():
                raise ValueError(f"a span must be {{start, end, label}}, got {span!r:.60}")
            if not 0 <= span["start"] < span["end"] <= len(text):
                raise ValueError(f"a span must be within the completion's {len(text)} characters, got {span!r:.60}")
            if span["start"] <= place < span["end"]:
                labels.append(span["label"])
        if len(labels) > 1:
            raise ValueError(f"spans must not overlap, but do at character {place}")
        return labels[0] if labels else None

    def _of_tokens(self, labels: Any, spans: Sequence[Any]) -> list[float | None]:
        places = [place for place, span in enumerate(spans) if span is not None]
        if not isinstance(labels, list) or len(labels) != len(places):
            given = f"{len(labels)} labels" if isinstance(labels, list) else f"labels {labels!r:.40}"
            raise ValueError(
                f"labels must have one number or null per token ({len(places)}), or there must be spans of {{start, end, "
                f"label}}; got {given}"
            )
        known: list[float | None] = [None] * len(spans)
        for place, label in zip(places, labels, strict=True):
            known[place] = label
        return known

    def _check(self, label: Any) -> None:
        if label is None:
            return
        if not isinstance(label, int | float) or not math.isfinite(label) or label == UNLABELLED:
            raise ValueError(f"a label must be a finite number other than {UNLABELLED}, or null, got {label!r}")
        if self.loss == "binary_cross_entropy" and not 0 <= label <= 1:
            raise ValueError(
                f"a label must be between 0 and 1, got {label!r}. Fix it, or set trainer.loss=squared_error"
            )

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
