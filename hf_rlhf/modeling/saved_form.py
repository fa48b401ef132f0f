"""Weights that transformers saves in another form than the model's own."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any


def load_converted(model: Any, folder: Path) -> None:
    """Load a checkpoint whose file has other names than the model, such as one for each expert of a mixture.

    Trainer skips those, with a warning, and keeps the weights that the model had.
    """
    if hasattr(model, "peft_config") or not hasattr(model, "save_pretrained"):
        return  # an adapter has names of its own, as has a module that is not a transformers model
    names = _saved_names(folder)
    if not names or set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", ())) <= names:
        return
    saved = type(model).from_pretrained(folder, config=deepcopy(model.config), dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def _saved_names(folder: Path) -> set[str]:
    """Return the names of the tensors in a folder's safetensors; empty if there are none."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not single.is_file():
        return set()
    from safetensors import safe_open

    with safe_open(single, "pt") as file:
        return set(file.keys())
