"""Reinforcement learning on language models: recipes of interchangeable plugins on `transformers.Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

from hf_rlhf.metric import Metric

__version__ = "0.1.0"

API_VERSION = "1.0"
"""Version of what plugins build on: see `hf_rlhf.api` and docs/api.md. It moves apart from the package's version."""

hookimpl = pluggy.HookimplMarker("hf_rlhf")
"""Marks a function of a plugin module as the offer of an axis; see `hf_rlhf.hookspecs`."""

if TYPE_CHECKING:
    from hf_rlhf.recipe import load_plugin, load_recipe
    from hf_rlhf.trainer import RLHFTrainer

__all__ = ["API_VERSION", "Metric", "RLHFTrainer", "__version__", "hookimpl", "load_plugin", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name in ("load_plugin", "load_recipe"):
        import hf_rlhf.recipe

        return getattr(hf_rlhf.recipe, name)
    if name == "RLHFTrainer":
        import hf_rlhf.trainer

        return hf_rlhf.trainer.RLHFTrainer
    raise AttributeError(f"module 'hf_rlhf' has no attribute {name!r}")
