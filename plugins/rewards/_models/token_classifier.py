"""Base of reward models over tokens: the position of each token in the completion, with its score."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, NamedTuple

from hf_rlhf.axes import chat

from .batches import Value
from .classifier import ModelReward
from .files import Kind
from .loading import Loaded
from .text import Text, row_in, text_in

logger = logging.getLogger(__name__)


class Read(NamedTuple):
    """Token of the reward model within a completion: its characters there, and its score."""

    start: int
    end: int
    score: float


@dataclass(kw_only=True)
class TokenModelReward(ModelReward):
    """Base class: a model that scores each token of prompt and completion as text, with a fast tokenizer."""

    kind: ClassVar[Kind] = "token"

    def read(
        self, prompts: Sequence[Any], completions: Sequence[str], value: Value, openings: Sequence[str] = ()
    ) -> list[list[Read] | None]:
        """Score the model's tokens within each completion, in order.

        None for a completion that a chat template changes, or with a score that is not finite.
        """
        with self._session() as held:
            openings = openings or [""] * len(prompts)
            texts = [self._text(held, *row) for row in zip(prompts, completions, openings, strict=True)]
            limit = held.limit(self.max_length)
            rows = {i: row_in(held.tokenizer, text, limit) for i, text in enumerate(texts) if text is not None}
            scores = self._scores(held, [row for row, _ in rows.values()], value)
        found: list[list[Read] | None] = [None] * len(texts)
        for (i, (_, spans)), given in zip(rows.items(), scores, strict=True):
            found[i] = [Read(*span, x) for span, x in zip(spans, given or [], strict=True) if span is not None]
            if not all(isfinite(token.score) for token in found[i] or []):
                logger.warning("%s: %r returns a non-finite number; the row has no score", self.asker, self.model)
                found[i] = None
        return found

    def _text(self, held: Loaded, prompt: Any, completion: str, opening: str) -> Text | None:
        prompt, why = self._prompt(held.tokenizer, prompt), "the chat template changes it"
        try:
            found = text_in(held.tokenizer, prompt, completion, opening)
        except chat.ChatError as error:
            found, why = None, str(error)
        if found is None:
            logger.warning("%s: %r has no score for the completion %.80r: %s", self.asker, self.model, completion, why)
        return found


def at_end(tokens: Sequence[Read], end: int) -> Read | None:
    """Return the token with the character before `end`, else the last one before it; None if all were truncated."""
    holding = next((token for token in tokens if token.start < end <= token.end), None)
    return holding or next((token for token in reversed(tokens) if token.end <= end), None)
