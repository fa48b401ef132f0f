"""What is used of TRL's DPOTrainer and not documented there, in one class.

tests/test_dpo_trl.py says what is relied on: which methods there are, what they are given, that the loss of a batch may be a
sum of no losses, and where the log-probs of a forward are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns of precomputed log-probs, and the names under which TRL's loss finds the reference's in a batch."""

UNSCORED = -100
"""The label of a token that is not scored."""

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""(B,) and (B,) log pi / pi_ref of the chosen and the rejected completions -> (B,)."""


class Seen:
    """A model whose last outputs stay at hand."""

    def __init__(self, model: Any):
        self.model = model
        self.outputs: Any = None

    def __call__(self, **inputs: Any) -> Any:
        self.outputs = self.model(**inputs)
        return self.outputs


class Whole:
    """A float64 model, called as TRL calls one with its head, which would compute in float32."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Any:
        """What TRL reads of a forward, of all logits at once."""
        outputs = self.model(**inputs)
        logits, given = outputs.logits[:, :-1], labels[:, 1:]
        off = given == UNSCORED
        each = logits.log_softmax(-1)
        return SimpleNamespace(
            log_probs=each.gather(-1, given.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(off, 0.0),
            entropy=-(each.exp() * each).sum(-1).detach().masked_fill(off, 0.0),
            mean_logits=logits.detach().mean(-1),
            is_top1=logits.argmax(-1) == given,
            aux_loss=getattr(outputs, "aux_loss", None),
        )


class PairTrainer(DPOTrainer):
    """TRL's DPOTrainer on rows that are tokenized, with losses of its own, and the model of the start as its reference.

    `pair_loss` takes the place of TRL's losses (`loss_type` is then an empty list); what TRL logs of a batch stays. The reference
    is `ref_model`, or, with an adapter and without a `ref_model`, the model without its adapter: TRL would copy the adapter.
    It never has dropout. Precomputed log-probs are columns of the datasets, not files. A float64 model is computed with in
    float64.
    """

    model: Any

    def __init__(self, *args: Any, pair_loss: PairLoss | None = None, **kwargs: Any):
        self.pair_loss = pair_loss
        super().__init__(*args, **kwargs)
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")
        self.precompute_ref_logps = True  # from now on: the loss reads them in the batch

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """TRL would tokenize texts."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL would hand rows on in files, which other processes look for in folders of their own."""
        found = self.of_rows(dataset, batch_size, self.reference)
        for column, values in zip(REFERENCE, zip(*found, strict=True), strict=True):
            dataset = dataset.add_column(column, list(values))
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's, of the reference's log-probs as they are in the batch or else computed here; or the mean of `pair_loss`."""
        ours = dict(zip(REFERENCE, self.reference(inputs), strict=True))
        if self.pair_loss is None:
            return super()._compute_loss(self._called(model), {**inputs, **ours}, return_outputs)
        seen = Seen(self._called(model))
        others = super()._compute_loss(seen, {**inputs, **ours}, False)  # of no pairs: it logs, and balances experts
        policy = seen.outputs.log_probs.sum(1).chunk(2)
        ratios = [x - ours[name] for x, name in zip(policy, REFERENCE, strict=True)]
        loss = self.pair_loss(*ratios).mean() + others
        return (loss, seen.outputs) if return_outputs else loss

    def reference(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(B,) and (B,) the reference's log-probs of the chosen and the rejected completions of a batch."""
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
        """The same of the model as it is."""
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, UNSCORED)
        outputs = self._called(self.model)(**read, labels=labels, fused_lm_head=True)
        chosen, rejected = outputs.log_probs.sum(1).chunk(2)
        return chosen, rejected

    def _called(self, model: Any) -> Any:
        return Whole(model) if self.model.dtype == torch.float64 else model

    def of_rows(
        self, rows: Dataset, batch_size: int, ask: Callable[[Mapping[str, Any]], tuple[Tensor, Tensor]]
    ) -> list[tuple[float, float]]:
        """What `ask` says of each row, on every process; each asks of its share."""
        count, own = self.accelerator.num_processes, self.accelerator.process_index
        places = list(range(own, len(rows), count))
        lengths = [max(map(len, pair)) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        places.sort(key=lambda place: lengths[place])
        found: list[tuple[int, tuple[float, float]]] = []
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            with torch.no_grad():
                chosen, rejected = ask(self._prepare_inputs(self.data_collator(list(rows.select(part)))))
            found += zip(part, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True)
        if count > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        return [pair for _, pair in sorted(found)]
