"""Every metric is declared: what a run logs, and what its plugins and the core say of it, are the same."""

from __future__ import annotations

import runs
from runs import FORMAT, SAMPLED, problems, trained, trainer
import pytest

from hf_rlhf.areas import AREAS
from hf_rlhf.axes import AXES
from hf_rlhf.host import Host
from hf_rlhf.metrics import CORE, EVALUATION, SECTIONS, declared_by, metrics_of, pattern

LAST = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
