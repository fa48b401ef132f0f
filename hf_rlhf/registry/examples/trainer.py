"""Supervised fine-tuning on prompts and completions by transformers.Trainer.

Try it: `hf-rlhf train sft 'trainer={use: completions}'`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Materials, OfflineTrainer

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class CompletionTrainer(OfflineTrainer):
    """Minimize the cross-entropy of completions; prompts are read and not learned."""

    name = "completions"
    head = "causal"
    rows = "demonstration"

    learn_prompt: bool = False
    """Learn the tokens of prompts too."""

    def columns(self) -> set[str]:
        return {"prompt", "completion"}

    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any] | None:
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ignored = prompt if self.learn_prompt else [-100] * len(prompt)
        return {"input_ids": prompt + completion, "labels": ignored + completion}

    def build(self, materials: Materials) -> Any:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        collate = DataCollatorForSeq2Seq(materials.tokenizer)  # pads labels too
        return materials.trainer(Trainer, TrainingArguments(**materials.arguments), data_collator=collate)


@hookimpl
def trainer() -> list[type[OfflineTrainer]]:
    return [CompletionTrainer]
