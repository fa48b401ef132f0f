"""Validation of rollout settings, and why `model.generate` decodes in place of the decode loop."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hf_rlhf.axes import attention_refusal, did_you_mean

from ._generating import inner_of
from ._trials import try_loop

logger = logging.getLogger(__name__)

OWN = {
    "max_new_tokens": "rollout.max_new_tokens",
    "max_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "do_sample": "rollout.temperature (0 in evaluation is greedy)",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "min_p": "rollout.min_p",
    "repetition_penalty": "rollout.repetition_penalty",
    "num_return_sequences": "rollout.num_generations",
    "stop_strings": "rollout.stop_strings",
    "eos_token_id": "the model's generation_config and the tokenizer",
    "pad_token_id": "the tokenizer",
}
"""Keys of a GenerationConfig that have their own settings here."""
NOT_SAMPLING = (
    *("num_beams", "num_beam_groups", "constraints", "force_words_ids", "penalty_alpha", "dola_layers"),
    *("guidance_scale", "prompt_lookup_num_tokens", "use_mtp", "speculation_type", "is_assistant"),
    *("assistant_early_exit", "num_assistant_tokens"),
    *("return_dict_in_generate", "token_healing", "low_memory", "transformers_version"),
)
"""Keys with which `generate` does not sample token by token from the policy, or does not return tokens."""


def generation_problems(kwargs: Mapping[str, Any]) -> Iterable[str]:
    """Yield errors in `generation_kwargs`."""
    from transformers import GenerationConfig

    known = [key for key in vars(GenerationConfig()) if not key.startswith("_")]
    for key in kwargs:
        if key in OWN:
            yield f"rollout.generation_kwargs must not contain {key!r}. Set {OWN[key]} instead"
        elif key in NOT_SAMPLING:
            yield (
                f"rollout.generation_kwargs must not contain {key!r}: completions must be sampled token by token from the "
                "policy. Remove it"
            )
        elif key not in known:
            hint = did_you_mean(key, known) or f" Use {', '.join(sorted(known))}."
            yield f"rollout.generation_kwargs: transformers.GenerationConfig has no {key!r}.{hint}"
    if not any(key in OWN or key in NOT_SAMPLING or key not in known for key in kwargs):
        try:
            GenerationConfig(**{"do_sample": True, **kwargs}).validate()
        except (TypeError, ValueError) as error:
            yield f"rollout.generation_kwargs: {error}"


def load_processors(paths: Sequence[str]) -> list[Any]:
    """Create the logits processors named by `package.module:Class`, without arguments. Raises `ValueError`."""
    from transformers import LogitsProcessor

    made = []
    for path in paths:
        where = f"rollout.logits_processors: {path!r}"
        module, colon, name = path.partition(":")
        if not (module and colon and name):
            raise ValueError(f"{where} must have the form package.module:Class")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{where} cannot be imported: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, LogitsProcessor)):
            raise ValueError(f"{where} must be a subclass of transformers.LogitsProcessor")
        try:
            made.append(cls())
        except TypeError as error:
            raise ValueError(f"{where} must be callable without arguments ({error}). Subclass it") from error
    return made


_SAID: set[str] = set()


def say_once(level: int, reason: str) -> None:
    """Log `reason` once per process."""
    if reason not in _SAID:
        _SAID.add(reason)
        logger.log(level, "rollout=generate decodes with model.generate: %s", reason)


_FOUND: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def unserved(model: Any, device: torch.device, longest: int) -> str | None:
    """Return why the decode loop does not support this model with rows of up to `longest` tokens, or None if it does.

    Each model is tested once (see `try_loop`).
    """
    inner = inner_of(model)
    if (limit := _stretches_beyond(inner.config)) is not None and longest > limit:
        return f"its rotary embedding depends on the longest row of a batch beyond {limit} tokens"
    if inner not in _FOUND:
        _FOUND[inner] = attention_refusal(model) or try_loop(model, device)
    return _FOUND[inner]


def _stretches_beyond(config: Any) -> int | None:
    """Return the length from which rotary frequencies depend on the positions in the batch, or None."""
    rope = getattr(config, "rope_parameters", None) or {}
    layers = rope.values() if all(isinstance(x, Mapping) for x in rope.values()) else [rope]
    limits = [
        x.get("original_max_position_embeddings") or config.max_position_embeddings
        for x in layers
        if x.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)
