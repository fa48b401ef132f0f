"""Metrics of held-out tokens, and a check that packed rows do not attend to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._labels import UNLABELLED
from ._scores import own_places

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import Trainer


def of_tokens(trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
    """Return metrics over all labelled tokens: -log p in nats, its exponential, and how often the token is most likely."""
    import torch

    size = trainer.args.per_device_eval_batch_size
    ids, labels = list(examples["input_ids"]), list(examples["labels"])
    mine = own_places(trainer, len(ids))
    if mine[-1] % trainer.args.world_size != trainer.args.process_index:  # another process counts it
        labels[mine[-1]] = [UNLABELLED] * len(labels[mine[-1]])
    places = sorted(mine, key=lambda place: len(ids[place]))
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(places), size):
        chosen = places[start : start + size]
        total += _of_batch(trainer, [ids[i] for i in chosen], [labels[i] for i in chosen])
    if trainer.args.world_size > 1:
        from accelerate.utils import gather_object

        total = torch.tensor(gather_object([total.tolist()]), dtype=torch.float64).sum(0)
    loss, right, tokens = total.tolist()
    loss, accuracy = loss / tokens, right / tokens
    return {
        "tokens/log_loss": loss,
        "tokens/perplexity": math.exp(min(loss, 700.0)),
        "tokens/accuracy": accuracy,
        "tokens/count": tokens,
    }


def _of_batch(trainer: Any, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Tensor:
    """Return (3,): the sum of -log p, the number of most likely tokens, and the number of labelled tokens."""
    import torch

    longest = max(map(len, ids))
    device = trainer.args.device
    padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    logits = trainer.model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    found = torch.zeros(3, dtype=torch.float64)
    for row, wanted in zip(logits, labels, strict=True):
        due = torch.tensor(wanted[1:], device=device)
        known = due != UNLABELLED
        scores = row[: len(due)][known]
        scores = scores if scores.dtype == torch.float64 else scores.float()
        due = due[known]
        logps = scores.log_softmax(-1).gather(-1, due[:, None])
        right = (scores.argmax(-1) == due).sum()
        found += torch.tensor([-float(logps.double().sum()), float(right), float(len(due))], dtype=torch.float64)
    return found


def check_packing(trainer: Any, rows: Sequence[list[int]]) -> None:
    """Check that packing leaves a row's logits unchanged. Raises `ValueError` if other rows in a sequence affect them."""
    import torch

    batch = trainer.data_collator([{"input_ids": row, "labels": list(row)} for row in rows])
    batch.pop("labels")
    inputs, model = trainer._prepare_inputs(batch), trainer.model
    training = model.training
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        together = model(**inputs, use_cache=False).logits[0].float()
        ids = [torch.tensor([row], device=together.device) for row in rows]
        alone = torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in ids])
    model.train(training)
    error = float((together - alone).abs().max() / alone.std())
    half = trainer.args.bf16 or model.dtype.itemsize < 4
    if not error < (0.25 if half else 1e-2):
        raise ValueError(
            f"trainer.packing: rows in one sequence change each other's logits in this model (by {error:.2g} of their "
            "spread). Set trainer.packing=false, or model.attn_implementation to one that separates them"
        )
