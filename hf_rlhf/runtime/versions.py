"""Versions that results depend on."""

from __future__ import annotations

import importlib.metadata
import platform

import torch


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    names = (
        "hf_rlhf",
        "torch",
        "transformers",
        "trl",
        "datasets",
        "accelerate",
        "tokenizers",
        "pluggy",
        "peft",
        "bitsandbytes",
        "wandb",
    )
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found, "torch_build": torch.__version__}
