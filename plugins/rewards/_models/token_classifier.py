"""What reward models over tokens share: each of their tokens' place in the completion, with the score there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, NamedTuple

from .batches import Value
from .classifier import ModelReward
from .files import Kind
from .loading import Loaded
from .text import Text, row_in, text_in

logger = logging.getLogger(__name__)


class Read(NamedTuple):
    """A token of the reward model within a completion: its characters there, and the score at it."""

    start: int
    end: int
    score: float


@dataclass(kw_only=True)
class TokenModelReward(ModelReward):
    """A model with a score at each token, which reads prompt and completion as text; its tokenizer is a fast one."""

    kind: ClassVar[Kind] = "token"

    def read(self, prompts: Sequence[Any], completions: Sequence[str], value: Value) -> list[list[Read] | None]:
        """The model's tokens within each completion, in order; None where a chat template does not give it back whole, and
        where a score is not finite."""
        with self._session() as held:
            texts = [self._text(held, *row) for row in zip(prompts, completions, strict=True)]
            limit = held.limit(self.max_length)
            rows = {i: row_in(held.tokenizer, text, limit) for i, text in enumerate(texts) if text is not None}
            scores = self._scores(held, [row for row, _ in rows.values()], value)
        found: list[list[Read] | None] = [None] * len(texts)
        for (i, (_, spans)), given in zip(rows.items(), scores, strict=True):
            found[i] = [Read(*span, x) for span, x in zip(spans, given or [], strict=True) if span is not None]
            if not all(isfinite(token.score) for token in found[i] or []):
                logger.warning("%s: %r gives a number that is not finite; its row has no score", self.asker, self.model)
                found[i] = None
        return found

    def _text(self, held: Loaded, prompt: Any, completion: str) -> Text | None:
        found = text_in(held.tokenizer, self._prompt(held, prompt), completion)
        if found is None:
            logger.warning(
                "%s: the chat template of %r rewrites a completion, which therefore has no score: %.80r",
                *(self.asker, self.model, completion),
            )
        return found


def at_end(tokens: Sequence[Read], end: int) -> Read | None:
    """The token that holds the character before `end`, else the last one before it; None where the model saw none."""
    holding = next((token for token in tokens if token.start < end <= token.end), None)
    return holding or next((token for token in reversed(tokens) if token.end <= end), None)
