"""The run doctor beside a run: every finding is said once, when it is made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_rlhf.contract.pattern import Finding
from hf_rlhf.metrics.doctor import Doctor, entries_of, ranges_of
from hf_rlhf.metrics.names import Named

logger = logging.getLogger(__name__)


class DoctorCallback(TrainerCallback):
    """Give every entry of the log to the doctor, in the first process, and what it finds to the listeners.

    `recipe`: the resolved recipe; `declared`: metrics that the run may log.
    """

    def __init__(self, recipe: Mapping[str, Any], declared: Sequence[Named]):
        self.recipe, self.declared = recipe, declared
        self.doctor = Doctor(recipe, ranges_of(declared))
        self.say: Callable[[Finding], None] = warn
        """Show a finding where the run was started: a warning, unless the command line replaces it."""
        self.listeners: list[Callable[[Finding], None]] = []

    @property
    def findings(self) -> list[Finding]:
        """Findings so far, those before a resume included."""
        return self.doctor.findings

    def read(self, run_folder: Path) -> None:
        """Start from the log in a folder, without saying anything: what an evaluation or a run before the resume wrote."""
        self.doctor = Doctor(self.recipe, ranges_of(self.declared))
        for entry in entries_of(run_folder):
            self.doctor.add(int(entry.pop("step")), entry)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the log, of which `RunLog` has just kept the entries of this run."""
        if state.is_world_process_zero:
            self.read(Path(args.output_dir or "outputs"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Take an entry, and say what is found in it for the first time."""
        if not state.is_world_process_zero:
            return
        for finding in self.doctor.add(state.global_step, logs or {}):
            for listener in (self.say, *self.listeners):
                listener(finding)


def warn(finding: Finding) -> None:
    """Log a finding as a warning."""
    told = f" Try {' '.join(finding.overrides)}" if finding.overrides else ""
    logger.warning("doctor.%s, since step %d: %s%s", finding.pattern, finding.step, finding.text, told)
