"""Tokenization and batching of preference rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import chat

from ._conversations import answers_to, ids_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def pair_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens of the prompt, of prompt and chosen, and of prompt and rejected. Raises `ValueError`.

    Texts get the end-of-sequence token appended, as a policy ends its completions; a chat template has its own end. Prompt
    tokens that merge with a completion's count as the completion's (as in TRL).
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None:
        if "prompt" not in row and isinstance(chosen, str):
            raise ValueError(
                "chosen and rejected are texts, which need a column prompt. Set dataset.prompt_column=null if they hold it"
            )
        prompt, chosen, rejected = _apart(chosen, rejected)
    answers = ("chosen", chosen), ("rejected", rejected)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        own = chat.one_bos(tokenizer, list(tokenizer(prompt)["input_ids"])) if prompt else []
        both = [_ended(ids, tokenizer.eos_token_id) for ids in ids_of(tokenizer, prompt, *answers)]
    else:
        own, *both = (
            list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for texts in [answers_to(tokenizer, prompt, *answers)]
            for text in [texts[0], *texts[1]]
        )
    return own[: min(shared(own, ids) for ids in both)], both[0], both[1]


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = zip(a, b, strict=False)
    return next((place for place, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _ended(ids: list[int], end: int | None) -> list[int]:
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _apart(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two conversations, or two texts, into their common start and the rest of each, as TRL's `extract_prompt` does."""
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if not texts:
        chosen, rejected = chat.messages_of(chosen, "chosen"), chat.messages_of(rejected, "rejected")
    count = shared(chosen, rejected)
    if texts:
        count -= count > 0 and chosen[count - 1] == " "  # a space belongs to the word after it
    else:
        count = min(count, len(chosen) - 1, len(rejected) - 1)
        if count < 1:
            raise ValueError("chosen and rejected must start with the same messages, as answers to one prompt")
    return chosen[:count], chosen[count:], rejected[count:]


class Pairs:
    """Collator: the chosen rows of a batch, then the rejected ones, padded on the right, with completion masks."""

    def __init__(self, pad: int, dtype: torch.dtype):
        self.pad, self.dtype = pad, dtype

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and completion_mask (2B, L), and the reference's log-probs (B,) if present."""
        import torch

        rows = [example[name] for name in ("chosen_ids", "rejected_ids") for example in examples]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows])
        places = torch.arange(longest)
        there = places < torch.tensor([[len(row)] for row in rows])
        before = torch.tensor([[len(example["prompt_ids"])] for example in [*examples, *examples]])
        found = {
            "input_ids": ids,
            "attention_mask": there.long(),
            "completion_mask": (there & (places >= before)).long(),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                found[name] = torch.tensor([example[name] for example in examples], dtype=self.dtype)
        return found
