"""Completions as text, decoded after their prompts: decoders of SentencePiece kind strip a text's first space."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

TAIL = 8
"""Tokens of the prompt before a completion that are decoded with it, where they give the end of the prompt's text."""


@dataclass
class CompletionText:
    """Decodes completions, without special tokens (`skip_special_tokens`) or with all but a final end-of-sequence token."""

    tokenizer: Any
    skip_special_tokens: bool = True
    ends: Collection[int] = ()
    """End-of-sequence tokens besides the tokenizer's own."""
    _known: dict[tuple[int, ...], tuple[list[int], str]] = field(default_factory=dict)
    """Ends of the prompts of the last call: steps are placed by many calls with one prompt."""

    def __call__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[str]:
        """Decode completions, each as the part that it adds to the text of its prompt."""
        keys = list(map(tuple, prompts))
        self._known = {key: self._known.get(key) or self._before(key) for key in dict.fromkeys(keys)}
        before = [self._known[key] for key in keys]
        bare = [self._bare(ids) for ids in completions]
        joint = self._decode([[*ids, *own] for (ids, _), own in zip(before, bare, strict=True)])
        texts = [text.removeprefix(start) for (_, start), text in zip(before, joint, strict=True)]
        apart = [i for i, (_, start) in enumerate(before) if not joint[i].startswith(start)]
        for i, text in zip(apart, self._decode([bare[i] for i in apart]), strict=True):
            texts[i] = text
        return texts

    def characters(self, prompt: Sequence[int], ids: Sequence[int]) -> int:
        """Return the number of characters of a completion's first tokens, without an incomplete character."""
        return len(self([prompt], [ids])[0].rstrip("\ufffd"))

    def _before(self, prompt: tuple[int, ...]) -> tuple[list[int], str]:
        """Return the end of a prompt, with its text."""
        tail, whole = list(prompt[-TAIL:]), list(prompt)
        text, full = self._decode([tail, whole])
        return (tail, text) if text and full.endswith(text) else (whole, full)

    def _bare(self, ids: Sequence[int]) -> list[int]:
        ended = not self.skip_special_tokens and ids and ids[-1] in self._ends
        return list(ids[:-1] if ended else ids)

    @cached_property
    def _ends(self) -> set[int]:
        return {*self.ends, self.tokenizer.eos_token_id}

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=self.skip_special_tokens)) if rows else []
