"""Token classification with labels on some tokens: collation, and a loss averaged over the labels of the whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Trainer

    from hf_rlhf.axes import Materials

UNLABELLED = -100


class Batch:
    """Collator for rows of tokens and labels, padded on the right."""

    def __init__(self, pad: int, dtype: torch.dtype):
        self.pad, self.dtype = pad, dtype

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels, (B, L) each; -100 for unlabelled tokens."""
        import torch

        longest = max(len(example["input_ids"]) for example in examples)

        def padded(name: str, filler: int, dtype: torch.dtype) -> Tensor:
            rows = [[*example[name], *[filler] * (longest - len(example[name]))] for example in examples]
            return torch.tensor(rows, dtype=dtype)

        lengths = torch.tensor([[len(example["input_ids"])] for example in examples])
        return {
            "input_ids": padded("input_ids", self.pad, torch.long),
            "attention_mask": (torch.arange(longest) < lengths).long(),
            "labels": padded("labels", UNLABELLED, self.dtype),
        }


def token_trainer(materials: Materials, loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Trainer:
    """Return a transformers Trainer with `loss`, which maps outputs (n, outputs) and labels (n,) to (n,).

    All labels in the micro-batches and processes of an optimizer step have equal weight: a classifier's own loss would be
    averaged within each micro-batch.
    """
    from transformers import Trainer, TrainingArguments

    def mean_over_the_step(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        known = labels != UNLABELLED
        logits = outputs.logits
        values = loss(logits[known] if logits.dtype.itemsize > 4 else logits[known].float(), labels[known])
        return values.sum() / (known.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    args = TrainingArguments(**materials.arguments)
    batch = Batch(materials.tokenizer.pad_token_id, dtype)
    return materials.trainer(Trainer, args, data_collator=batch, compute_loss_func=mean_over_the_step)
