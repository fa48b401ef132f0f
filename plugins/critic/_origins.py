"""Initial weights of a separate critic: trunk and score head of a model on disk or of a reward model."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._tokenizers import split_difference, tokenizer_of
from ..rewards._models.files import ModelFiles, Stored
from ..rewards._models.heads import LINEAR, Headed, classifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CLASSIFIERS = ("SequenceClassification", "TokenClassification", "RewardModel")
"""Parts of architecture names of models with a score head."""


def from_path(path: str) -> tuple[Any, nn.Module | None]:
    """Return the trunk of a checkpoint and its head, or None instead of a head without exactly one output."""
    from transformers import AutoConfig, AutoModel

    who = f"critic.init={path!r}"
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{who} is not a model; use policy, reward, a folder or a name on the Hub ({error})"
        ) from error
    declared = " ".join(config.architectures or [])
    heads = {f"{name}.weight" for name in LINEAR} & Stored(path, None).names
    if not heads and not any(name in declared for name in CLASSIFIERS):
        return AutoModel.from_pretrained(path).base_model, None
    kind: Any = "token" if "TokenClassification" in declared else "sequence"
    wanted = ModelFiles(path, None, None, "float32", "cpu", False, {}, kind, {})
    tokenizer: Any = None  # only causal models score by words
    model, labels = classifier(wanted, config, tokenizer, {}, who)
    if len(labels) > 1:
        logger.warning(
            "%s has %d labels (%s): the critic uses its trunk, with a head that starts at 0",
            *(who, len(labels), ", ".join(labels)),
        )
        return model.base_model, None
    return trunk_and_head(model.eval(), who)


def trunk_and_head(model: Any, who: str) -> tuple[Any, nn.Module]:
    """Return a reward model's trunk and head, such that head(last hidden state at a token) is the model's score there.

    For a causal model with two words it is the second one's logit minus the first one's. Raises `ValueError` if scores are
    not computed by such a head, and if the trunk attends to later tokens.
    """
    trunk, head = model.base_model, _head(model, who)
    ids = torch.arange(1, 8, device=model.device).unsqueeze(0)
    other = ids.clone()
    other[0, -1] += 1
    with torch.no_grad():
        states, later = (trunk(input_ids=x, attention_mask=torch.ones_like(x)).last_hidden_state for x in (ids, other))
        due = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.flatten(0, -2)
        due = due[:, -1] - due[:, 0] if due.size(-1) == 2 else due[:, 0]
        found = head(states.to(next(head.parameters()).dtype)).flatten()[-len(due) :]
    if not _near(later[:, :-1], states[:, :-1]):
        raise ValueError(
            f"{who}: {_what(model)} attends to later tokens, which a value must not. Set critic.init=policy, or start from "
            "a decoder"
        )
    if not _near(found, due):
        raise ValueError(
            f"{who}: the scores of {_what(model)} must be its head on a token's hidden state, and are not. Set "
            "critic.init=policy"
        )
    return trunk, head


def _head(model: Any, who: str) -> nn.Module:
    """Copy the head, with one output."""
    module, words = getattr(model, "score", None) or getattr(model, "classifier", None), False
    if module is None and hasattr(model, "get_output_embeddings"):
        module, words = model.get_output_embeddings(), True
    last: Any = module[-1] if isinstance(module, nn.Sequential) else module
    if not isinstance(last, nn.Linear):
        raise ValueError(f"{who}: {_what(model)} has no linear head on its hidden states. Set critic.init=policy")
    if last.out_features > 1 + words:
        raise ValueError(
            f"{who}: the head of {_what(model)} must have 1 output, got {last.out_features}. Set critic.init=policy"
        )
    head: Any = copy.deepcopy(module)
    last = head[-1] if isinstance(head, nn.Sequential) else head
    mean, std = (model.mean, model.std) if isinstance(model, Headed) else (0.0, 1.0)
    with torch.no_grad():
        weight, bias = last.weight, last.weight.new_zeros(last.out_features) if last.bias is None else last.bias
        if last.out_features == 2:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        last.weight, last.bias, last.out_features = nn.Parameter(weight / std), nn.Parameter((bias - mean) / std), 1
    return head


def _near(x: Tensor, y: Tensor) -> bool:
    bound = 1e-4 if x.dtype in (torch.float32, torch.float64) else 0.05
    return bool((x - y).abs().max() <= bound * y.abs().max().clamp(min=1e-6))


def _what(model: Any) -> str:
    return type(getattr(model, "base_model", model)).__name__ if isinstance(model, Headed) else type(model).__name__


# Tokens


def check_vocabulary(policy: Any, model: Any, origin: str) -> None:
    """Check that the critic, which reads the policy's token ids, has an embedding for each. Raises `ValueError`."""
    ours, theirs = (len(x.get_input_embeddings().weight) for x in (policy, model))
    if theirs < ours:
        raise ValueError(
            f"critic.init={origin!r}: its vocabulary must cover the policy's {ours} tokens, got {theirs}. Start the critic "
            "from a model with the policy's tokenizer, or set critic.init=policy"
        )


def check_tokenizer(own: PreTrainedTokenizerBase, path: str | None, revision: str | None, origin: str) -> None:
    """Check that the tokenizer at `path` agrees with `own`. Raises `ValueError` naming the first token that differs."""
    theirs = tokenizer_of(path, revision)
    if theirs is None:
        logger.warning(
            "critic.init=%r: %s has no tokenizer, so only the vocabulary sizes were compared",
            origin,
            path,
        )
        return
    if (difference := first_difference(own, theirs)) is not None:
        raise ValueError(
            f"critic.init={origin!r}: the tokenizer of {path} must be the policy's, but {difference}. Start the critic from "
            "a model with the policy's tokenizer, or set critic.init=policy"
        )


def first_difference(own: Any, theirs: Any) -> str | None:
    """Describe the lowest token id on which the tokenizers differ, or the first place where they split a text differently.

    Returns None if they agree. Tokens that only `theirs` has do not count: the policy never produces them.
    """
    ours, its = own.get_vocab(), theirs.get_vocab()
    added = set(theirs.get_added_vocab()) - set(ours)
    differ = [token for token in ours.keys() | (its.keys() - added) if ours.get(token) != its.get(token)]
    if differ:
        token = min(differ, key=lambda token: (min(x[token] for x in (ours, its) if token in x), token))
        said = [f"{x[token]}" if token in x else "no token" for x in (ours, its)]
        return f"token {token!r} is {said[0]} in the policy's and {said[1]} there"
    return split_difference(own, theirs)
