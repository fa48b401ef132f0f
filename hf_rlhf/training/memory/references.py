"""Memory of the references of an algorithm: their models, and what is kept of their scores."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, TrainingArguments

from hf_rlhf.axes import Reference
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.references import base_label, bases_of
from hf_rlhf.config.schedule import device_of
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import without_weights
from hf_rlhf.runtime.errors import UserError


def reference_models(
    model: Any, a: Algorithm, args: TrainingArguments, notes: list[str]
) -> dict[str, tuple[Reference, Any]]:
    """Return label -> (reference, its model without weights) of those with a model of their own on this device; `model` itself
    stands for a copy of it."""
    found: dict[str, tuple[Reference, Any]] = {}
    for label, base in bases_of(a).items():
        if "adapter" in base.needs or base.follows_policy or device_of(base, args.device) != args.device:
            continue
        path, given = getattr(base, "path", None), getattr(base, "dtype", "policy")
        if path is None and type(base).score is not Reference.score:  # a server's, for instance
            continue
        if path is None:
            found[label] = base, model
            continue
        dtype: Any = str(model.dtype).removeprefix("torch.") if given == "policy" else given
        try:
            named = Model(path=path, revision=getattr(base, "revision", None), dtype=dtype)
            found[label] = base, without_weights(AutoModelForCausalLM, named)
        except UserError as error:
            notes.append(f"without the model of {label}: {error}")
    return found


def kept_scores(a: Algorithm, rows: int, length: int, itemsize: int) -> int:
    """Return the bytes of what is kept of the references' scores of `rows` rows: log-probs, likeliest tokens and their ids."""
    per_token = 0
    for use in a.references.values():
        per_token += itemsize * ("logps" in use.needs) + (itemsize + 4) * (use.top_k or 0)
    return rows * length * per_token


def compared_in_update(a: Algorithm) -> list[str]:
    """Return the labels of the models that the update runs."""
    return sorted({base_label(a, use.reference) for use in a.references.values() if use.in_update})
