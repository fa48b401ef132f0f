"""Supervised fine-tuning, the first step of arXiv:2203.02155, by TRL's `SFTTrainer`.

The loss is -log p averaged over the learned tokens of all micro-batches and processes of an optimizer step. Departures from
TRL: the prompt is tokenized alone, as in a rollout, and the completion after it, so that the model learns what the policy
will sample; each completion and each assistant turn ends in the end-of-sequence token; rows that are too long are dropped
and counted, not truncated; held-out metrics average over all tokens; no telemetry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Footprint, Materials, OfflineTrainer

from ._metrics import OF_SFT
from ._sft_measures import check_packing, of_tokens
from ._sft_rows import labelled, of_completion, of_messages, of_text

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, Trainer


@dataclass(kw_only=True)
class SFT(OfflineTrainer):
    """Fits a causal language model to completions, conversations or texts; the result is a policy for any recipe."""

    name = "sft"
    head = "causal"
    rows: ClassVar[str] = "demonstration"
    metrics = OF_SFT

    format: Literal["prompt_completion", "messages", "text"] = "prompt_completion"
    """Columns to read: `prompt` and `completion` (texts, or lists of chat messages), `messages` (whole conversations), or
    `text`."""
    completion_only_loss: bool = True
    """Learn only completions, or the assistant turns of `messages`. A `text` is learned as a whole."""
    packing: bool = False
    """Pack rows into sequences of up to `max_length` tokens, by best fit; none is split, and each attends only to itself.
    Batches then consist of such sequences. Rejected for models that would mix the rows."""

    def in_words(self) -> str:
        learned = "completions" if self.completion_only_loss and self.format != "text" else "whole texts"
        return f"supervised fine-tuning on {learned}"

    def columns(self) -> set[str]:
        return set(self.format.split("_"))

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        if self.format == "text":
            parts = of_text(tokenizer, row["text"])
        elif self.format == "messages":
            parts = of_messages(tokenizer, row["messages"])
        else:
            parts = of_completion(tokenizer, row["prompt"], row["completion"])
        return labelled(parts, all_of_it=not self.completion_only_loss)

    def footprint(self, adapter: bool) -> Footprint:
        return Footprint(packed=self.packing, logits=True)

    def build(self, materials: Materials) -> Trainer:
        from trl import SFTConfig

        from ._sft_trainer import HeadTrainer

        args = SFTConfig(
            **materials.arguments,
            max_length=self._room(materials.model) if self.packing else None,
            packing=self.packing,
            eval_packing=False,
            completion_only_loss=False,  # encoded in the labels
            chat_template_path=None,
        )
        made = materials.trainer(HeadTrainer, args)
        if self.packing:
            check_packing(made, [row[:32] for row in materials.train[:3]["input_ids"]])
        return made

    def measure(self, trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
        return of_tokens(trainer, examples)

    def _room(self, model: Any) -> int:
        """Return the maximum tokens of a packed sequence."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = min((x for x in (self.max_length, context) if x is not None), default=None)
        if room is None:
            raise ValueError("trainer.packing needs trainer.max_length, because the model defines no context length")
        return room


@hookimpl
def trainer() -> list[type[OfflineTrainer]]:
    return [SFT]
