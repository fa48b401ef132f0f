"""Scores of token rows: batches by similar length, padding, the forward pass, and one label's score."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Value = Literal["logit", "log_odds", "probability"]


class Row(NamedTuple):
    """Input of a model for one row."""

    ids: list[int]
    types: list[int] | None
    """Token types, if its tokenizer provides them."""
    cut: bool
    """True if the text was truncated."""


def scores_of(
    model: Any, rows: Sequence[Row], batch_size: int, max_tokens: int | None, index: int, value: Value
) -> list[Any]:
    """Return a float per row, or a list of one float per token if the model scores tokens; None for a row without tokens.

    Decoders that classify sequences score the last non-padding token. If such a model defines no padding token, or has no
    embedding for it, one that occurs in no row of the batch is used, so that batches and single rows score the same token.
    """
    scores: list[Any] = [None] * len(rows)
    config = model.config.get_text_config()
    own_pad, words = config.pad_token_id, len(model.get_input_embeddings().weight)
    read = inspect.signature(model.forward).parameters
    multiple = getattr(model.config, "problem_type", None) == "multi_label_classification"
    try:
        for batch in batches([len(row.ids) for row in rows], batch_size, max_tokens):
            members = [rows[i] for i in batch]
            pad = own_pad if own_pad is not None and 0 <= own_pad < words else _unused(members)
            config.pad_token_id = pad
            given = {name: x for name, x in _padded(members, pad, model.device).items() if name in read}
            found = score(model(**given).logits, index, value, multiple).tolist()
            for i, row, x in zip(batch, members, found, strict=True):
                scores[i] = x[: len(row.ids)] if isinstance(x, list) else x
    finally:
        config.pad_token_id = own_pad
    return scores


def score(logits: Tensor, index: int, value: Value, multiple: bool = False) -> Tensor:
    """Return the logit, log-odds or probability of label `index`: (..., labels) -> (...).

    Labels are exclusive (softmax) unless there is only one, or `multiple` allows several at once (sigmoid).
    """
    import torch

    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits[..., index]
    if value == "logit":
        return chosen
    if logits.size(-1) > 1 and not multiple:
        others = torch.cat([logits[..., :index], logits[..., index + 1 :]], dim=-1)
        chosen = chosen - others.logsumexp(-1)
    return chosen.sigmoid() if value == "probability" else chosen


def batches(lengths: Sequence[int], batch_size: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Yield batches of indices of nonempty rows, sorted by length, shortest first."""
    batch: list[int] = []
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: lengths[row]):
        full = len(batch) == batch_size or (max_tokens is not None and (len(batch) + 1) * lengths[row] > max_tokens)
        if batch and full:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(rows: Sequence[Row], pad: int, device: Any) -> dict[str, Tensor]:
    """Return the model's inputs: rows padded on the right to the same length, and their mask."""
    import torch

    longest = max(len(row.ids) for row in rows)
    given = {
        "input_ids": [row.ids + [pad] * (longest - len(row.ids)) for row in rows],
        "attention_mask": [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows],
    }
    if rows[0].types is not None:
        given["token_type_ids"] = [(row.types or []) + [0] * (longest - len(row.ids)) for row in rows]
    return {name: torch.tensor(values, device=device) for name, values in given.items()}


def _unused(rows: Sequence[Row]) -> int:
    """Return the lowest token id that occurs in none of the rows."""
    used = set().union(*[row.ids for row in rows])
    return next(token for token in range(len(used) + 1) if token not in used)
