"""Copy of a source in a worker process or actor."""

from __future__ import annotations

import pickle
from typing import Any

from hf_rlhf.contract.plugin_copy import close_copy, set_up_copy, unpacked
from hf_rlhf.contract.reward_source import RewardSource, prepare_all
from hf_rlhf.scoring.runners.reward_call import RewardCall, call, logged


class Served:
    """Source sent by `process_runner.packed_source`, set up."""

    def __init__(self, body: bytes, device: str = "cpu") -> None:
        self.source: RewardSource
        self.source, given = unpacked(body)
        self.label: str = given["label"]
        prepare_all(self.source)
        set_up_copy(self.source, given, device)

    def run(self, state: bytes | None, unit: RewardCall, ask: Any = None) -> dict[str, Any]:
        """Run a unit, after loading the pickled `state` into the source, if there is one. Return its result as plain data."""
        if state and (loaded := pickle.loads(state)):  # noqa: S301  (from the parent)
            self.source.load_state_dict(loaded)
        return logged(self.label, self.source, call(self.label, self.source, unit)).as_json()

    def close(self) -> None:
        """Close the source and its nested plugins."""
        close_copy(self.source)
