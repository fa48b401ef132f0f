"""Copy of a source in a worker process or actor."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from typing import Any

from hf_rlhf.contract.base import nested_of
from hf_rlhf.contract.reward_source import RewardSource, prepare_all
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall, call, logged


class Served:
    """Source sent by `process_runner.packed`, set up."""

    def __init__(self, packed: bytes) -> None:
        sent = pickle.loads(packed)  # noqa: S301  (from the parent)
        sys.path[:] = [*sys.path, *(place for place in sent["path"] if place not in sys.path)]
        _import(*sent["module"])
        given: dict[str, Any] = pickle.loads(sent["body"])  # noqa: S301  (from the parent)
        self.label: str = given["label"]
        self.source: RewardSource = given["source"]
        self._plugins = [self.source, *nested_of(self.source)]
        prepare_all(self.source)
        if given["setup"]:
            import torch

            from hf_rlhf.batch import Context

            device = torch.device("cpu")
            context = Context(device=device, policy=None, **given["context"])
            for plugin in self._plugins:
                plugin.setup(context)

    def run(self, state: bytes | None, unit: RewardCall) -> CallResult:
        """Run a unit, after loading the pickled `state` into the source, if there is one."""
        if state and (loaded := pickle.loads(state)):  # noqa: S301  (from the parent)
            self.source.load_state_dict(loaded)
        return logged(self.label, self.source, call(self.label, self.source, unit))

    def close(self) -> None:
        """Close the source and its nested plugins."""
        for plugin in self._plugins:
            plugin.close()


def _import(name: str, file: str | None) -> None:
    """Import the source's module under its name, from its file if no import finds it."""
    if name == "__main__":
        return
    try:
        importlib.import_module(name)
    except ImportError:
        if file is None:
            raise
        specification = importlib.util.spec_from_file_location(name, file)
        assert specification is not None
        assert specification.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
