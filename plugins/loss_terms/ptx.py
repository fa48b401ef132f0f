"""Next-token loss on separate texts, against forgetting (PPO-ptx, InstructGPT, arXiv:2203.02155).

The mean over all tokens of an optimizer step's texts, in the same step as the policy loss. Departures: the texts come from
one file or dataset, shuffled once and repeated in that order; the paper's coefficient, 27.8, applies to its own
normalization.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Count, HubDataset, LossTerm, Positive, TextTerm, chat

from ._texts import is_file, read_texts

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class PTX(TextTerm):
    """-coef log p of each token except the first; each text ends in the end-of-sequence token."""

    name = "ptx"
    words = "{coef:g} x language-model loss on {path}"

    path: HubDataset
    """A file of texts (.txt: one per line; .jsonl: one object per line), or the name of a dataset on the Hub."""
    column: str = "text"
    """Column with the text; unused for .txt."""
    split: str = "train"
    """Split of a dataset on the Hub, tokenized at the start; "train[:10000]" takes its first 10,000 rows."""
    rows: Count = 8
    """Texts per optimizer step, over all processes."""
    max_tokens: Annotated[int, Ge(2)] = 512
    """Longer texts are split into parts of this many tokens, each a separate text."""
    coef: Positive = 1.0
    """Factor of the loss."""

    def __post_init__(self) -> None:
        self._texts: list[list[int]] = []

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if is_file(self.path) and not Path(self.path).expanduser().is_file():
            yield f"path: no such file {self.path!r}. Set path to a .txt or .jsonl file, or to a dataset on the Hub"

    def setup(self, context: Context) -> None:
        assert context.policy is not None
        assert context.tokenizer is not None
        config: Any = context.policy.config
        room = getattr(config.get_text_config(), "max_position_embeddings", None)
        if room is not None and self.max_tokens > room:
            raise ValueError(
                f"loss_terms.ptx: max_tokens must be at most the model's context of {room}, got {self.max_tokens}. Lower it"
            )
        texts, end = read_texts(self.path, self.column, self.split), context.tokenizer.eos_token_id
        self._texts = []
        for ids in context.tokenizer(texts)["input_ids"] if texts else ():
            ids = chat.one_bos(context.tokenizer, ids)
            whole = ids if end is None or ids[-1:] == [end] else [*ids, end]
            parts = (whole[at : at + self.max_tokens] for at in range(0, len(whole), self.max_tokens))
            self._texts += [part for part in parts if len(part) > 1]
        if not self._texts:
            raise ValueError(f"loss_terms.ptx: {self.path!r} has no text of two or more tokens. Set another path")
        random.Random(context.seed).shuffle(self._texts)

    def close(self) -> None:
        self._texts = []

    def texts(self, step: int) -> list[list[int]]:
        if not self._texts:
            raise RuntimeError("loss_terms.ptx has no texts: call setup(context) first")
        return [self._texts[(step * self.rows + i) % len(self._texts)] for i in range(self.rows)]

    def __call__(self, logps: Tensor, mask: Tensor) -> Tensor:
        return -self.coef * logps.masked_fill(mask == 0, 0.0)


@hookimpl
def loss_terms() -> list[type[LossTerm]]:
    return [PTX]
