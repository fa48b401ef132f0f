"""Reinforcement learning on language models: recipes of interchangeable plugins on `transformers.Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

from hf_rlhf._version import API_VERSION, __version__
from hf_rlhf.contract.metric import Metric
from hf_rlhf.runtime.plain_text import clean_own_logs

clean_own_logs()
hookimpl = pluggy.HookimplMarker("hf_rlhf")
"""Marks a function of a plugin module as the offer of an axis; see `hf_rlhf.registry.hookspecs`."""

if TYPE_CHECKING:
    from hf_rlhf.config.recipe import load_plugin, load_recipe
    from hf_rlhf.training.trainer import RLHFTrainer

__all__ = ["API_VERSION", "Metric", "RLHFTrainer", "__version__", "hookimpl", "load_plugin", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name in ("load_plugin", "load_recipe"):
        import hf_rlhf.config.recipe

        return getattr(hf_rlhf.config.recipe, name)
    if name == "RLHFTrainer":
        import hf_rlhf.training.trainer

        return hf_rlhf.training.trainer.RLHFTrainer
    raise AttributeError(f"module 'hf_rlhf' has no attribute {name!r}")
