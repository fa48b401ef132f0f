"""Direct preference optimization (DPO, arXiv:2305.18290) and variants, by TRL's `DPOTrainer`.

The implicit reward of a completion is beta log pi / pi_ref, and the loss compares those of the chosen and the rejected one.
Departures from TRL: `label_smoothing` works for the sigmoid loss too (conservative DPO: Mitchell 2023, and arXiv:2403.00409);
three bounded losses: fidelity (Tsai et al., SIGIR 2007), savage (Masnadi-Shirazi and Vasconcelos, NIPS 2008) and symmetric
(arXiv:1712.09482; as a preference loss in arXiv:2404.04102); common prefixes of completions may be masked; pairs that are too
long are dropped and counted, not truncated; with an adapter the reference is the model without it; no telemetry.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from hf_rlhf import hookimpl
from hf_rlhf.axes import Footprint, Materials, OfflineTrainer, Positive

from ._dpo_losses import Divergence, LossType, own_loss, reasons, score
from ._dpo_measures import of_policy
from ._dpo_rows import Pairs, pair_of, shared
from ._metrics import OF_DPO

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, Trainer

    from hf_rlhf.axes import ModelSettings

ALPHA, TAU = 0.5, 0.05
"""TRL's defaults of `f_alpha_divergence_coef` and `discopop_tau`."""


@dataclass(kw_only=True)
class DPOTrainer(OfflineTrainer):
    """Raises the log-prob of chosen over rejected completions of a causal model, relative to the initial model.

    Rows have `prompt`, `chosen` and `rejected`: texts, to which the end-of-sequence token is appended, or lists of messages;
    or `chosen` and `rejected` are conversations with a common start. Pairs of equal tokens are dropped.
    """

    name = "dpo"
    head = "causal"
    rows: ClassVar[str] = "preference"
    metrics = OF_DPO

    beta: Positive = 0.1
    """Strength of the constraint to the reference; for `ipo` and `sppo_hard`, 1 / (2 beta) is the target gap."""
    loss_type: LossType = "sigmoid"
    """Loss of the implicit rewards: TRL's losses of single pairs, and fidelity, savage and symmetric."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong: for `sigmoid` (conservative DPO), `robust` (unbiased under such noise), `exo_pair`."""
    f_divergence_type: Divergence = "reverse_kl"
    """Divergence from the reference that defines the implicit reward (arXiv:2309.16240)."""
    f_alpha_divergence_coef: float | None = None
    """alpha of the alpha-divergence; None: 0.5."""
    discopop_tau: Positive | None = None
    """Temperature of `discopop`; None: 0.05."""
    reference: Literal["frozen", "adapter_off", "precomputed"] | None = None
    """`frozen`: a copy of the model; `adapter_off`: the model without its adapter; `precomputed`: log-probs of every row
    computed before training, without a second model or forward. None: `adapter_off` with `model.lora`, else `frozen`. All
    are the initial model."""
    mask_shared_prefix: bool = False
    """Exclude tokens before the first difference of chosen and rejected from the completions. Differences of two sums of
    log-ratios stay the same; token averages, and losses of single completions, change."""

    def in_words(self) -> str:
        smoothed = f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        divergence = "" if self.f_divergence_type == "reverse_kl" else f", {self.f_divergence_type.replace('_', ' ')}"
        loss = f"{self.loss_type.replace('_', ' ')} loss, beta {self.beta:g}{smoothed}{divergence}"
        return f"DPO ({loss}): chosen above rejected completions, relative to the initial model"

    def __post_init__(self) -> None:
        given = {"f_alpha_divergence_coef": self.f_alpha_divergence_coef, "discopop_tau": self.discopop_tau}
        if found := reasons(self.loss_type, self.label_smoothing, self.f_divergence_type, **given):
            raise ValueError("; ".join(found))

    def problems(self, model: ModelSettings) -> Iterable[str]:
        if self.reference == "adapter_off" and model.lora is None:
            yield "trainer.reference=adapter_off needs an adapter. Set model.lora={r: 16} or trainer.reference=frozen"

    def columns(self) -> set[str]:
        return {"chosen", "rejected"}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        prompt, chosen, rejected = pair_of(row, tokenizer)
        if chosen == rejected:
            return None
        if self.mask_shared_prefix:
            prompt = chosen[: shared(chosen, rejected)]
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    def footprint(self, adapter: bool) -> Footprint:
        frozen = self.reference == "frozen" or (self.reference is None and not adapter)
        return Footprint(texts=2, reference=frozen)

    def build(self, materials: Materials) -> Trainer:
        import torch
        from trl import DPOConfig

        from ._pair_trainer import PairTrainer

        wide = torch.float64 if materials.model.dtype == torch.float64 else torch.float32
        loss = own_loss(self.loss_type, self.beta, self.label_smoothing, self.f_divergence_type, self._alpha)
        if loss is None and self.f_divergence_type == "alpha_divergence" and wide == torch.float64:
            raise ValueError("TRL's alpha_divergence does not support float64. Set model.dtype=float32")
        args = DPOConfig(
            **materials.arguments,
            beta=self.beta,
            loss_type=[self.loss_type] if loss is None else [],
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type if loss is None else "reverse_kl",
            f_alpha_divergence_coef=self._alpha,
            discopop_tau=TAU if self.discopop_tau is None else self.discopop_tau,
            max_length=None,
            disable_dropout=False,
            precompute_ref_log_probs=self.reference == "precomputed",
        )
        pairs = Pairs(materials.tokenizer.pad_token_id, wide)
        return materials.trainer(
            PairTrainer, args, data_collator=pairs, ref_model=self._copy(materials.model), pair_loss=loss
        )

    @property
    def _alpha(self) -> float:
        return ALPHA if self.f_alpha_divergence_coef is None else self.f_alpha_divergence_coef

    def _copy(self, model: Any) -> Any:
        """Return the frozen reference, or None without one."""
        adapter = hasattr(model, "peft_config")
        if self.reference == "adapter_off" and not adapter:
            raise ValueError("reference=adapter_off needs an adapter, but the model has none")
        if self.reference in ("adapter_off", "precomputed") or (self.reference is None and adapter):
            return None
        copied = copy.deepcopy(model)
        return (copied.unload() if adapter else copied).eval().requires_grad_(False)

    def measure(self, trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
        pairs: Any = trainer
        size = trainer.args.per_device_eval_batch_size
        policy, reference = (pairs.of_rows(examples, size, ask) for ask in (pairs.policy, pairs.reference))
        prompts = list(map(len, examples["prompt_ids"]))
        tokens = [
            [len(row) - count for row, count in zip(examples[name], prompts, strict=True)]
            for name in ("chosen_ids", "rejected_ids")
        ]
        return of_policy(policy, reference, self._rewards(policy, reference), *tokens)

    def _rewards(self, policy: Any, reference: Any) -> list[tuple[float, float]]:
        """Return the implicit rewards, up to a constant per prompt."""
        import torch

        log_ratios = torch.tensor(policy, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
        found = self.beta * score(log_ratios, self.f_divergence_type, self._alpha)
        return [(chosen, rejected) for chosen, rejected in found.tolist()]


@hookimpl
def trainer() -> list[type[OfflineTrainer]]:
    return [DPOTrainer]
