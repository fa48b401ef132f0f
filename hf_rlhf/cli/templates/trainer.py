"""A reward model from ratings: a sequence classifier fitted to numbers that people gave to texts, by squared error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Materials, OfflineTrainer, Positive

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, Trainer

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(OfflineTrainer):
    """Rows have `text` and `rating`; `rewards.reward_model` then scores with the trained model."""

    name = "my_name"
    head = "sequence"
    reward = "reward_model"
    metrics = (
        Metric(
            "mean_error",
            "rating",
            "mean distance of the model's rating from the given one, on held-out rows",
            when="evaluation",
            summary="min",
        ),
    )

    best: Positive = 5.0
    """The rating that becomes the score 1."""

    def columns(self) -> set[str]:
        return {"text", "rating"}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        rating = row["rating"]
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
            raise ValueError(f"rating is {rating!r}; a number is due")
        ids = list(tokenizer(row["text"])["input_ids"])
        return {"input_ids": ids, "labels": rating / self.best} if ids else None

    def build(self, materials: Materials) -> Trainer:
        from transformers import Trainer, TrainingArguments

        return materials.trainer(Trainer, TrainingArguments(**materials.arguments))

    def measure(self, trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
        model: Any = trainer.model
        errors = []
        for ids, label in zip(examples["input_ids"], examples["labels"], strict=True):
            score = model(input_ids=torch.tensor([ids], device=model.device)).logits.squeeze()
            errors.append(abs(float(score) - label) * self.best)
        return {"mean_error": sum(errors) / len(errors)}


@hookimpl
def trainer() -> list[type[OfflineTrainer]]:
    return [MyName]
