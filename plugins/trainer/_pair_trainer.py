"""All uses of undocumented parts of TRL's DPOTrainer, in one class.

tests/unit/plugins/test_dpo_trl.py checks what it relies on: the methods and their arguments, that a batch may have no losses,
and the location of a forward's log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer

from ._scores import own_places
from ._whole_head import UNSCORED, AdaptedHead, Whole

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns of precomputed reference log-probs, which are also TRL's names for them in a batch."""

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Loss (B,) of log pi / pi_ref of the chosen and the rejected completions, (B,) each."""


class Seen:
    """Model wrapper that keeps the last outputs."""

    def __init__(self, model: Any):
        self.model = model
        self.outputs: Any = None

    def __call__(self, **inputs: Any) -> Any:
        self.outputs = self.model(**inputs)
        return self.outputs


class PairTrainer(AdaptedHead, DPOTrainer):
    """TRL's DPOTrainer on tokenized rows, with additional losses, and the initial model as its reference.

    `pair_loss` replaces TRL's losses (`loss_type` is then an empty list); TRL's metrics stay. The reference is `ref_model`, or,
    with an adapter and without a `ref_model`, the model without its adapter, where TRL would copy the adapter. It never has
    dropout. Precomputed log-probs are columns of the datasets, not files. A float64 model is evaluated in float64.
    """

    model: Any

    def __init__(self, *args: Any, pair_loss: PairLoss | None = None, **kwargs: Any):
        self.pair_loss = pair_loss
        super().__init__(*args, **kwargs)
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")
        self.precompute_ref_logps = True  # set late: the loss reads them from the batch

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Return the rows unchanged, where TRL would tokenize texts."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Return the rows unchanged, where TRL would write them to files that other processes do not find."""
        found = self.of_rows(dataset, batch_size, self.reference)
        for column, values in zip(REFERENCE, zip(*found, strict=True), strict=True):
            dataset = dataset.add_column(column, list(values))
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Return TRL's loss or the mean of `pair_loss`, computing the reference's log-probs unless the batch has them."""
        ours = dict(zip(REFERENCE, self.reference(inputs), strict=True))
        if self.pair_loss is None:
            return super()._compute_loss(self._called(model), {**inputs, **ours}, return_outputs)
        seen = Seen(self._called(model))
        others = super()._compute_loss(seen, {**inputs, **ours}, False)  # without losses: logs, and balances experts
        policy = seen.outputs.log_probs.sum(1).chunk(2)
        ratios = [x - ours[name] for x, name in zip(policy, REFERENCE, strict=True)]
        loss = self.pair_loss(*ratios).mean() + others
        return (loss, seen.outputs) if return_outputs else loss

    def reference(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the reference's log-probs of a batch's chosen and rejected completions, (B,) each."""
        if REFERENCE[0] in inputs:
            return inputs[REFERENCE[0]], inputs[REFERENCE[1]]
        training = self.model.training
        self.model.eval()
        try:
            model = self.model if self.ref_model is None else self.ref_model
            return self.compute_ref_log_probs(self._called(model), inputs)
        finally:
            self.model.train(training)

    def policy(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the current model's log-probs of a batch's chosen and rejected completions, (B,) each."""
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, UNSCORED)
        outputs = self._called(self.model)(**read, labels=labels, fused_lm_head=True)
        chosen, rejected = outputs.log_probs.sum(1).chunk(2)
        return chosen, rejected

    def _called(self, model: Any) -> Any:
        return Whole(model) if self.model.dtype == torch.float64 else self.called(model)

    def of_rows(
        self, rows: Dataset, batch_size: int, ask: Callable[[Mapping[str, Any]], tuple[Tensor, Tensor]]
    ) -> list[tuple[float, float]]:
        """Evaluate `ask` on every row, split over the processes; all processes get all results."""
        places = own_places(self, len(rows))
        lengths = [max(map(len, pair)) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        places.sort(key=lambda place: lengths[place])
        found: list[tuple[int, tuple[float, float]]] = []
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            with torch.no_grad():
                chosen, rejected = ask(self._prepare_inputs(self.data_collator(list(rows.select(part)))))
            found += zip(part, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        known = dict(found)
        return [known[place] for place in range(len(rows))]
