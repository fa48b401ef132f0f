"""Sections of a recipe without rollouts: `model`, as in any recipe, and `dataset`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from hf_rlhf.config.sections import Dataset
from hf_rlhf.contract.base import HubDataset
from hf_rlhf.contract.model_settings import Model


@dataclass(kw_only=True)
class OfflineDataset:
    """The rows. A split that is made here never separates rows of one prompt."""

    path: HubDataset | None = None
    """A JSON, JSONL, CSV or Parquet file, a folder saved by `datasets`, a name on the Hub, or `builtin:addition`."""
    name: str | None = None
    """Configuration name of a dataset on the Hub."""
    split: str = "train"
    """Split to train on."""
    eval_path: HubDataset | None = None
    """Like `path`, for evaluation."""
    eval_split: str | None = None
    """Split to evaluate on, of `eval_path` or `path`."""
    held_out: Annotated[int, Ge(0)] = 512
    """Rows held out for evaluation where there is no evaluation data: about this many, at most a tenth of the dataset."""
    prompt_column: str | None = "prompt"
    """Column of the prompt. null: there is none, and a pair's common start is its prompt (`chosen` and `rejected` hold whole
    conversations)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column that the trainer reads -> column of the dataset, such as {prompt: question}."""

    def as_dataset(self) -> Dataset:
        """Return the settings that both kinds of recipe share."""
        names = ("path", "name", "split", "eval_path", "eval_split", "held_out")
        return Dataset(**{name: getattr(self, name) for name in names})


OFFLINE_SECTIONS: dict[str, type] = {"model": Model, "dataset": OfflineDataset}
"""Recipe key -> settings class."""
