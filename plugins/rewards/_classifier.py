"""Loading classifiers of sequences and of tokens, and scoring rows of tokens with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["sequence", "token"]


def load_classifier(
    path: str,
    revision: str | None,
    dtype: str,
    device: torch.device,
    *,
    kind: Kind = "sequence",
    labels: frozenset[int] = frozenset({1}),
    asker: str = "rewards.reward_model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, frozen and in eval mode, with its tokenizer. Raises `ValueError` where it is no reward model.

    `labels`: how many outputs it may have. `asker`: who loads it, for messages.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    if config.num_labels not in labels:
        wanted = " or ".join(f"num_labels={n}" for n in sorted(labels))
        raise ValueError(f"{asker}: {path!r} has {config.num_labels} labels; a {kind} classifier with {wanted} is due")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{asker}: {path!r} has no tokenizer: save it beside the model ({error})") from error
    if kind == "token" and not tokenizer.is_fast:
        raise ValueError(
            f"{asker}: the tokenizer of {path!r} does not say which characters a token stands for: save a fast one"
        )
    loader: Any = (
        transformers.AutoModelForSequenceClassification
        if kind == "sequence"
        else transformers.AutoModelForTokenClassification
    )
    model, loading = loader.from_pretrained(path, revision=revision, dtype=dtype, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"{asker}: {path!r} has no trained weights for {', '.join(sorted(loading['missing_keys']))}; it was not saved "
            f"as a {kind} classifier"
        )
    return model.eval().requires_grad_(False).to(device), tokenizer


def score_rows(model: PreTrainedModel, rows: list[list[int]], batch_size: int) -> list[float]:
    """Token rows -> one float each, in batches of neighbours in length.

    Decoders score the last token that is not padding. Where the model names no padding token, one that occurs in none
    of the batch's rows is used, so that a batch scores the token that a single row would.
    """
    import torch

    scores = [0.0] * len(rows)
    config = model.config.get_text_config()
    own_pad = config.pad_token_id
    try:
        for batch in _batches(rows, batch_size):
            pad = own_pad if own_pad is not None else _unused([rows[row] for row in batch])
            config.pad_token_id = pad
            with torch.no_grad():
                logits = model(**_padded(model, [rows[row] for row in batch], pad)).logits
            for row, score in zip(batch, logits.float().squeeze(-1).tolist(), strict=True):
                scores[row] = score
    finally:
        config.pad_token_id = own_pad
    return scores


def score_tokens(model: PreTrainedModel, rows: list[list[int]], batch_size: int) -> list[list[float]]:
    """Token rows -> one float per token, in batches of neighbours in length; an empty row gives none.

    With two labels the float is the second one's logit minus the first one's, the log of their odds.
    """
    import torch

    scores: list[list[float]] = [[] for _ in rows]
    for batch in _batches(rows, batch_size):
        pad = model.config.get_text_config().pad_token_id or 0
        with torch.no_grad():
            logits = model(**_padded(model, [rows[row] for row in batch], pad)).logits.float()
        values = logits[..., -1] if logits.size(-1) == 1 else logits[..., 1] - logits[..., 0]
        for row, per_token in zip(batch, values.tolist(), strict=True):
            scores[row] = per_token[: len(rows[row])]
    return scores


def _batches(rows: list[list[int]], batch_size: int) -> list[list[int]]:
    """The places of the rows that hold a token, neighbours in length together."""
    order = sorted((row for row in range(len(rows)) if rows[row]), key=lambda row: len(rows[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _padded(model: PreTrainedModel, rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    """What the model reads: rows of one length, padded on the right, and their mask."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
    lengths = torch.tensor([[len(row)] for row in rows], device=model.device)
    mask = (torch.arange(longest, device=model.device) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask}


def _unused(rows: list[list[int]]) -> int:
    """The lowest token id in none of the rows."""
    used = set().union(*rows)
    return next(token for token in range(len(used) + 1) if token not in used)
