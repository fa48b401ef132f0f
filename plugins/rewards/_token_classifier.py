"""What reward models over tokens share: their settings, their loading, and each token's place in the completion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from hf_rlhf.axes import Context, Count, RewardSource

from ._classifier import load_classifier, score_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MARK = "\ue000"
"""A character of the private use area that stands for the completion in a chat template."""


class Read(NamedTuple):
    """A token of the reward model within a completion: its characters there, and the model's logit at it."""

    start: int
    end: int
    logit: float


class Text(NamedTuple):
    """What the model reads of a row, and where the completion lies in it."""

    text: str
    start: int
    stop: int
    stripped: int
    """Characters that the chat template took from the front of the completion."""
    chat: bool


@dataclass(kw_only=True)
class TokenClassifierReward(RewardSource):
    """A token classifier with a tokenizer of its own, which reads prompt and completion as text."""

    labels: ClassVar[frozenset[int]] = frozenset({1})

    model: str
    """A folder or a name on the Hub of an `AutoModelForTokenClassification`, its fast tokenizer beside it."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of its weights."""
    batch_size: Count = 16
    """Rows per forward pass."""
    max_length: Count | None = None
    """Of longer texts the model sees this many tokens, from the end; all when left out. The rest gets no score."""

    def __post_init__(self) -> None:
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def setup(self, context: Context) -> None:
        self.load_model(context.device)

    def load_model(self, device: torch.device) -> None:
        """Load the classifier and its tokenizer, on `device`."""
        asker = f"rewards.{self.name}"
        self._loaded = load_classifier(
            self.model, self.revision, self.dtype, device, kind="token", labels=self.labels, asker=asker
        )

    def close(self) -> None:
        self._loaded = None

    def read(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[list[Read] | None]:
        """The model's tokens within each completion, in order; None where a chat template does not give it back whole."""
        if self._loaded is None:
            raise RuntimeError(f"rewards.{self.name} is not loaded: call setup(context) or load_model(device) first")
        model, tokenizer = self._loaded
        texts = [self._text(tokenizer, *row) for row in zip(prompts, completions, strict=True)]
        places = [row for row, text in enumerate(texts) if text is not None]
        encoded = [_encode(tokenizer, text, self.max_length) for text in texts if text is not None]
        scores = score_tokens(model, [ids for ids, _ in encoded], self.batch_size)
        found: list[list[Read] | None] = [None] * len(texts)
        for row, (_, spans), logits in zip(places, encoded, scores, strict=True):
            found[row] = [Read(*span, logit) for span, logit in zip(spans, logits, strict=True) if span is not None]
        return found

    def _text(self, tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: str) -> Text | None:
        if isinstance(prompt, str):
            return Text(prompt + completion, len(prompt), len(prompt + completion), 0, False)
        if not tokenizer.chat_template:
            raise ValueError(
                f"rewards.{self.name}: the prompts are conversations and the tokenizer of {self.model!r} has no chat "
                "template; save one with it, or use text prompts"
            )
        found = _in_chat(tokenizer, prompt, completion)
        if found is None:
            logger.warning(
                "rewards.%s: the chat template of %r rewrites a completion, which therefore has no score: %.80r",
                *(self.name, self.model, completion),
            )
        return found


def _in_chat(tokenizer: PreTrainedTokenizerBase, prompt: list[Any], completion: str) -> Text | None:
    """The conversation by the template, which may strip white space around the completion; None where it does more."""

    def rendered(content: str) -> str:
        answer = {"role": "assistant", "content": content}
        return str(tokenizer.apply_chat_template([*prompt, answer], tokenize=False))

    around, text = rendered(MARK), rendered(completion)
    start = around.rfind(MARK)
    if start < 0 or text[:start] != around[:start]:
        return None
    front = len(completion) - len(completion.lstrip())
    for stripped in (0, front):
        for kept in (completion[stripped:], completion[stripped:].rstrip()):
            if text[start:] == kept + around[start + len(MARK) :]:
                return Text(text, start, start + len(kept), stripped, True)
    return None


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: Text, max_length: int | None
) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Token ids, and for each token its characters in the completion, None outside of it."""
    encoded = tokenizer(text.text, add_special_tokens=not text.chat, return_offsets_mapping=True)
    cut = -(max_length or 0)
    spans: list[tuple[int, int] | None] = []
    for start, end in encoded["offset_mapping"][cut:]:
        inside = end > text.start and (start < text.stop or end <= text.stop)
        place = (max(start, text.start), min(end, text.stop))
        spans.append((place[0] - text.start + text.stripped, place[1] - text.start + text.stripped) if inside else None)
    return encoded["input_ids"][cut:], spans
