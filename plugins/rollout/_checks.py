"""Validation of rollout settings, and the settings and models that the decode loop supports."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_rlhf.axes import at_least_float32, attention_refusal

from ._decoding import CHECK, Decoder

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
    from difflib import get_close_matches

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
            near = get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Use {', '.join(sorted(known))}."
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

    Each model is tested once: the logits of four rows of six fixed tokens are compared with a plain forward.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if (limit := _stretches_beyond(inner.config)) is not None and longest > limit:
        return f"its rotary embedding depends on the longest row of a batch beyond {limit} tokens"
    if inner not in _FOUND:
        _FOUND[inner] = attention_refusal(model) or _mismatch(model, device)
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


def _mismatch(model: Any, device: torch.device) -> str | None:
    """Describe a mismatch of the decode loop's logits, or return None."""
    words = len(model.get_input_embeddings().weight)
    prompts, steps = [[(5 + 3 * i) % words for i in range(7)], [(8 + 5 * i) % words for i in range(4)]], CHECK + 2
    told = torch.tensor([[(11 + 7 * i + 5 * row) % words for i in range(steps)] for row in range(4)], device=device)
    end = int(told[1, CHECK - 1])
    found: dict[tuple[int, int], Tensor] = {}

    def sampler(logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, None]:
        for i, row in enumerate(rows.tolist()):
            found[row, step] = logits[i].clone()
        return told[rows, step], None

    try:
        Decoder(model=model, eos=[end], steps=steps, device=device)(prompts, 2, sampler)
        errors = [_error(model, prompts[row // 2], told[row], row, found) for row in range(4)]
    except Exception as error:
        return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
    bound, half = _bound(model, device)
    off = float(torch.cat(errors).median() if half else torch.cat(errors).max())
    return None if off <= bound else f"its logits differ from those of a plain forward by {off:.2g} of their spread"


def _bound(model: Any, device: torch.device) -> tuple[float, bool]:
    """Return the tolerance for rounding errors in logits, and True for half precision, where outliers may exceed it."""
    narrow = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if narrow or torch.is_autocast_enabled(device.type):
        return 0.1, True
    return 1e-3 if torch.get_float32_matmul_precision() == "highest" else 1e-2, False


@torch.no_grad()
def _error(model: Any, prompt: list[int], told: Tensor, row: int, found: dict[tuple[int, int], Tensor]) -> Tensor:
    """Return the difference (steps,) of the loop's logits from the plain forward's, relative to the latter's spread."""
    ids = torch.cat((torch.tensor(prompt, device=told.device), told)).unsqueeze(0)
    plain = at_least_float32(model(input_ids=ids, use_cache=False).logits[0])
    steps = sorted(step for at, step in found if at == row)
    due = plain[[len(prompt) - 1 + step for step in steps]]
    off = torch.stack([found[row, step] for step in steps]) - due
    return off.norm(dim=1) / (due - due.mean(1, keepdim=True)).norm(dim=1).clamp(min=1e-30)
