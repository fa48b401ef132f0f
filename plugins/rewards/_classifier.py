"""Loading a sequence classifier and scoring token rows with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_classifier(
    path: str, revision: str | None, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, frozen and in eval mode, with its tokenizer. Raises `ValueError` where it is no reward model."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(path, revision=revision)
    if config.num_labels != 1:
        raise ValueError(
            f"rewards.reward_model: {path!r} has {config.num_labels} labels; a reward model is a sequence classifier "
            "with one output (num_labels=1)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"rewards.reward_model: {path!r} has no tokenizer: save it beside the model ({error})"
        ) from error
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path, revision=revision, dtype=dtype, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ValueError(
            f"rewards.reward_model: {path!r} has no trained weights for {', '.join(sorted(loading['missing_keys']))}; "
            "it was not saved as a sequence classifier"
        )
    return model.eval().requires_grad_(False).to(device), tokenizer


def score_rows(model: PreTrainedModel, rows: list[list[int]], batch_size: int) -> list[float]:
    """Token rows -> one float each, in batches of neighbours in length.

    Decoders score the last token that is not padding. Where the model names no padding token, one that occurs in none
    of the batch's rows is used, so that a batch scores the token that a single row would.
    """
    import torch

    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    config = model.config.get_text_config()
    own_pad = config.pad_token_id
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            pad = own_pad if own_pad is not None else _unused([rows[row] for row in batch])
            config.pad_token_id = pad
            longest = len(rows[batch[-1]])
            ids = torch.tensor([rows[row] + [pad] * (longest - len(rows[row])) for row in batch], device=model.device)
            lengths = torch.tensor([[len(rows[row])] for row in batch], device=model.device)
            mask = (torch.arange(longest, device=model.device) < lengths).long()
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask).logits
            for row, score in zip(batch, logits.float().squeeze(-1).tolist(), strict=True):
                scores[row] = score
    finally:
        config.pad_token_id = own_pad
    return scores


def _unused(rows: list[list[int]]) -> int:
    """The lowest token id in none of the rows."""
    used = set().union(*rows)
    return next(token for token in range(len(used) + 1) if token not in used)
