"""Checks of a loaded model: weights that can be trained, a policy that reads left to right, a row for every token.

Before a model is loaded, its configuration and the recipe say what its number format does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import ModelError, load_config
from hf_rlhf.modeling.causality import future_seen
from hf_rlhf.modeling.router import experts
from hf_rlhf.registry.host import get_host

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainingArguments

BALANCE = "router_balance"
"""Loss term of every mixture of experts whose configuration has a coefficient for it."""
UNDERFLOW = "small gradients, their squares and Adam's epsilon underflow in float16"
FIX = "bfloat16, or float32 (training.bf16=true then computes in bfloat16)"
OTHER_MODALITY = re.compile("image|video|audio")
"""Names of special tokens that stand for something else than text."""


def known_model(settings: Model, model: Any = None, trust_remote_code: bool = False) -> tuple[Any, str | None]:
    """Return configuration and number format of a loaded model or of the one that the settings name, without loading it.

    Each is None if it is not known: the configuration is not on this machine, or names no format.
    """
    if model is not None and not isinstance(model, str):
        return model.config, str(model.dtype).removeprefix("torch.")
    try:
        here = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        config = load_config(settings.path, settings.revision, **here)
    except ModelError:
        config = None
    found = getattr(config, "dtype", None) if settings.dtype == "auto" else settings.dtype
    return config, None if found is None else str(found).removeprefix("torch.")


def dtype_problems(dtype: str | None, lora: bool) -> Iterator[str]:
    """Yield why weights in `dtype` cannot be trained. `lora`: only an adapter is, in float32."""
    if dtype == "float16" and not lora:
        yield f"model.dtype must not be float16, as the weights to train are: {UNDERFLOW}. Set model.dtype={FIX}"


def dtype_remarks(dtype: str | None, lora: bool, args: TrainingArguments, config: Any = None) -> Iterator[str]:
    """Yield what the number format of the weights does to updates."""
    if dtype == "float16" and lora:
        yield (
            "model.dtype=float16: the adapter is float32, but its gradients pass through float16, where small ones vanish: on a "
            "small model they were off by 2% with 4,000 tokens in an optimizer step, and by 20% with 65,000; bfloat16 by 1%"
        )
    if dtype != "bfloat16" or lora:
        return
    std = getattr(config, "initializer_range", None) or 0.02
    most, least = (lost_share(args.learning_rate, std, bits) for bits in (8, 9))
    yield (
        "model.dtype=bfloat16: an update below 1/512 to 1/256 of its weight (half a unit in the last place) is rounded away; at "
        f"training.learning_rate={args.learning_rate:g}, about the size of Adam's updates, weights with a standard deviation of "
        f"{std:g} lose {least:.1%} to {most:.1%} of them. Set model.dtype=float32 with training.bf16=true, which keeps them"
    )


def with_router_balance(algorithm: Algorithm, config: Any) -> Algorithm:
    """Return the algorithm with the load-balancing loss of a mixture of experts whose configuration has a coefficient.

    The recipe's own term is left as it is; without the plugin (`-p no:loss_terms.router_balance`) nothing is added.
    """
    host = get_host()
    named = any(term.name == BALANCE for term in algorithm.loss_terms)
    if config is None or not experts(config) or named or BALANCE not in host.names("loss_terms"):
        return algorithm
    plugin: Any = host.get("loss_terms", BALANCE)
    return replace(algorithm, loss_terms=[*algorithm.loss_terms, plugin()]) if plugin.coefficient(config) else algorithm


def router_problems(algorithm: Algorithm, config: Any) -> Iterator[str]:
    """Yield which plugins need the routers of a model that has none."""
    if config is not None and not experts(config):
        for path, plugin in algorithm.plugins():
            if plugin.needs & {"router_logits", "routing_fractions"}:
                yield f"{path}={plugin.name} needs a mixture of experts, and the model is dense: remove it"


def lost_share(update: float, std: float, bits: int) -> float:
    """Return the share of normally distributed weights with magnitudes above `update` x 2^`bits`."""
    return 1 - math.erf(update * 2**bits / (std * math.sqrt(2)))


def check_trained(module: nn.Module, name: str = "the model") -> None:
    """Raise `ModelError` if weights would be trained in float16."""
    found = [key for key, p in module.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if found:
        raise ModelError(
            f"{name} must not be trained in float16, as {_first(found)} would be: {UNDERFLOW}. Set model.dtype={FIX}; in Python, "
            "load it in one of these"
        )


def check_causal(model: Any) -> None:
    """Raise `ModelError` for a policy whose states depend on later tokens."""
    if (seen := future_seen(model)) is not None:
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        raise ModelError(
            f"{name} attends to later tokens, so that its log-probs would look at the tokens that they predict: changing the "
            f"last token of a row moved earlier logits by {seen:.1g} of the largest. Set is_decoder to true in its "
            "configuration if it was trained so, or choose a decoder-only model"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Raise `ModelError` if the tokenizer has a token without a row in the embedding.

    The padding token needs none, since padding is masked, and neither does one that stands for an image, a video or a sound.
    """
    rows = len(model.get_input_embeddings().weight)
    named: dict[str, Any] = dict(tokenizer.special_tokens_map)
    free = {token for name, token in named.items() if name == "pad_token" or OTHER_MODALITY.search(name)}
    free -= {token for name, token in named.items() if name in ("bos_token", "eos_token")}
    lacking = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows and token not in free)
    if lacking:
        tokens = _first([f"{token!r} with id {id}" for id, token in lacking])
        raise ModelError(
            f"every token must have a row in the model's embedding, which has {rows}, got {tokens}. Resize the "
            "embedding (model.resize_token_embeddings(len(tokenizer))) and save the model, or set model.tokenizer to the model's "
            "own"
        )


def _first(names: list[str]) -> str:
    """Name the first, and count the others."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
