"""The score of a reward model: a sequence classifier with one output, in its own words (arXiv:2203.02155).

It need not share the policy's tokenizer: it receives text and uses its own tokenizer and chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Count, RewardSource
from hf_rlhf.batch import Rollouts

from ._classifier import load_classifier, score_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class RewardModel(RewardSource):
    """The classifier's output for each prompt with its completion; batches give what single rows give."""

    name = "reward_model"
    provides = frozenset({"reward_model"})

    model: str
    """A folder or a name on the Hub of an `AutoModelForSequenceClassification` with `num_labels=1`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of its weights."""
    batch_size: Count = 16
    """Rows per forward pass."""
    max_length: Count | None = None
    """Of longer texts the model sees this many tokens, from the end; all when left out."""

    def __post_init__(self) -> None:
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def setup(self, context: Context) -> None:
        self.load_model(context.device)

    def load_model(self, device: torch.device) -> None:
        """Load the classifier and its tokenizer, on `device`."""
        self._loaded = load_classifier(self.model, self.revision, self.dtype, device)

    def fresh_model(self, device: torch.device) -> PreTrainedModel:
        """The classifier once more, for a critic that starts from it and then learns."""
        return load_classifier(self.model, self.revision, self.dtype, device)[0]

    def close(self) -> None:
        self._loaded = None

    def __call__(self, rollouts: Rollouts) -> list[float]:
        if self._loaded is None:
            raise RuntimeError("rewards.reward_model is not loaded: call setup(context) or load_model(device) first")
        model, tokenizer = self._loaded
        rows = [
            self._ids(tokenizer, prompt, completion)[-(self.max_length or 0) :]
            for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True)
        ]
        return score_rows(model, rows, self.batch_size)

    def _ids(self, tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: str) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer(prompt + completion)["input_ids"]
        if not tokenizer.chat_template:
            raise ValueError(
                f"rewards.reward_model: the prompts are conversations and the tokenizer of {self.model!r} has no chat "
                "template; save one with it, or use text prompts"
            )
        messages = [*prompt, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [RewardModel]
