"""Splitting rows into micro-batches within a number of rows and a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainingArguments

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.modeling.attention import draws
from hf_rlhf.modeling.packing import by_prompt, common_length
from hf_rlhf.modeling.policy import ActorCritic, why_not_packed
from hf_rlhf.modeling.token_batch import Attention, Forks, TokenBatch, pieces_of


def choose_attention(algorithm: Algorithm, model: Any) -> Attention:
    """Resolve `update.attention` for a model on its device. Raises `ValueError` if the architecture does not support it."""
    wanted = algorithm.update.attention
    if wanted == "padded" or (wanted == "auto" and "double_backward" in algorithm.needs):
        return "padded"
    if wanted == "auto":
        fastest: list[Attention] = ["flex", "packed"] if model.device.type == "cuda" else ["packed"]
        return next((attention for attention in fastest if why_not_packed(model, attention) is None), "padded")
    reason = why_not_packed(model, wanted)
    if reason is None and wanted == "flex" and model.device.type == "cpu":
        reason = "FlexAttention has no backward on a CPU"
    if reason is not None:
        raise ValueError(
            f"update.attention={wanted} is not supported by {type(model).__name__}: {reason}. Set it to auto or padded"
        )
    return wanted


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Limits of one forward and backward.

    Packed rows count their tokens and each prompt once; padded rows count their padding. Each piece of a row with forks counts as
    a row, in a micro-batch with the others. A row longer than `max_tokens` is a micro-batch of its own.
    """

    pad: int
    max_rows: int
    """No bound where packed rows have `max_tokens`: rows are then what the tokens leave room for."""
    max_tokens: int | None = None
    attention: Attention = "packed"
    once: bool = True
    """Equal rows enter a packed forward once."""

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        models: ActorCritic,
        args: TrainingArguments,
        pad: int,
        autocast: AbstractContextManager[None],
    ) -> Batching:
        """Return the recipe's limits for models on their device, which run in `autocast`. Raises as `choose_attention`."""
        tokens = algorithm.update.max_tokens_per_micro_batch
        with autocast:
            attention = choose_attention(algorithm, models.policy)
        rows = args.per_device_train_batch_size
        return cls(pad=pad, max_rows=rows, max_tokens=tokens, attention=attention, once=not draws(models))

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        mask: Tensor,
        forks: Forks | None = None,
    ) -> TokenBatch:
        """Return a `TokenBatch` of these rows; `mask` (B, T)."""
        return TokenBatch(prompts, completions, mask, self.pad, self.attention, forks, once=self.once)

    def empty(self, like: Tensor) -> TokenBatch:
        """Return a row without a sampled token, on the device and in the dtype of `like`."""
        return self.batch([[self.pad]], [[self.pad]], like.new_zeros((1, 1)))

    def cut(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        forks: Forks | None = None,
    ) -> list[list[int]]:
        """Split `rows`, indices of `prompts` and `completions`, into micro-batches."""
        cuts = forks or [()] * len(prompts)
        pieces = [pieces_of(p, len(c), own) for p, c, own in zip(prompts, completions, cuts, strict=True)]
        counts = [len(own) for own in pieces]
        if self.attention == "padded":
            lengths = [max(len(ids) + stop - start for start, stop, ids in own) for own in pieces]
            return self._by_length(rows, lengths, counts)
        lengths = [len(c) + repeated(p, c, own) for p, c, own in zip(prompts, completions, pieces, strict=True)]
        return self._by_prompt(rows, prompts, lengths, counts)

    def tokens(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        forks: Forks | None = None,
    ) -> list[int]:
        """Return how many tokens each of `rows` adds to a forward: in packed rows a prompt counts once, and equal rows do."""
        found, seen = [], set()
        for row in rows:
            prompt, completion, cuts = prompts[row], completions[row], forks[row] if forks else ()
            own = pieces_of(prompt, len(completion), cuts)
            if self.attention == "padded":
                found.append(sum(len(ids) + stop - start for start, stop, ids in own))
                continue
            first, equal = (tuple(prompt),), (tuple(prompt), tuple(completion), str(cuts))
            new = 0 if self.once and equal in seen else len(completion) + repeated(prompt, completion, own)
            found.append(new + (0 if first in seen else len(prompt)))
            seen |= {first, equal}
        return found

    def _by_length(self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """Split shortest first, so that rows of one part have similar lengths."""
        parts: list[list[int]] = []
        for row in sorted(rows, key=lambda i: lengths[i]):
            part = parts[-1] if parts else []
            count = sum(counts[i] for i in part) + counts[row]
            fits = self.max_tokens is None or count * lengths[row] <= self.max_tokens
            if part and count <= self.max_rows and fits:
                part.append(row)
            else:
                parts.append([row])
        return parts

    def _by_prompt(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], lengths: Sequence[int], counts: Sequence[int]
    ) -> list[list[int]]:
        """Keep the rows of a prompt together where they fit, so that it is computed once: the largest first, each into the first
        part that has room (first-fit decreasing)."""
        pieces = [
            (len(prompts[piece[0]]) + sum(lengths[row] for row in piece), sum(counts[row] for row in piece), piece)
            for group in by_prompt([prompts[row] for row in rows])
            for piece in self._pieces([rows[i] for i in group], prompts, lengths, counts)
        ]
        if self.max_tokens is not None:
            pieces.sort(key=lambda each: -each[0])
        parts: list[tuple[list[int], list[int]]] = []  # (tokens and rows in use, rows)
        for tokens, count, piece in pieces:
            place = next((part for part in parts if self._fit(part[0][0] + tokens, part[0][1] + count)), None)
            if place is None:
                parts.append(([tokens, count], list(piece)))
            else:
                place[0][0] += tokens
                place[0][1] += count
                place[1].extend(piece)
        return [part for _, part in parts]

    def _fit(self, tokens: int, rows: int) -> bool:
        """Return whether packed rows are within the limits."""
        return rows <= self.max_rows if self.max_tokens is None else tokens <= self.max_tokens

    def _pieces(
        self, group: list[int], prompts: Sequence[Sequence[int]], lengths: Sequence[int], counts: Sequence[int]
    ) -> list[list[int]]:
        """Split the rows of one prompt where they do not fit into one part."""
        pieces: list[list[int]] = []
        used = 0
        for row in group:
            count = sum(counts[i] for i in pieces[-1]) + counts[row] if pieces else 0
            if pieces and self._fit(used + lengths[row], count):
                pieces[-1].append(row)
                used += lengths[row]
            else:
                pieces.append([row])
                used = len(prompts[row]) + lengths[row]
        return pieces


def repeated(prompt: Sequence[int], completion: Sequence[int], pieces: Sequence[tuple[int, int, Sequence[int]]]) -> int:
    """Return how many tokens the forks of a row add: those before a piece that neither the prompt nor the piece before has."""
    added, last = 0, prompt
    for start, stop, ids in pieces:
        if ids is not prompt:
            added += len(ids) - max(common_length(ids, prompt), common_length(ids, last))
        if len(pieces) > 1:
            last = [*ids, *completion[start:stop]]
    return added
