"""What an offline trainer is: it trains a model on the rows of a dataset, without rollouts. Axis `trainer`.

A recipe with a `trainer` has `trainer`, `model`, `dataset` and `training`, and none of the other axes. The core reads the
rows, has each encoded, loads the model with its head, and runs what `build` gives: checkpoints, resume, metrics and the
held-out evaluation before and after are the core's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Count, Plugin

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from hf_rlhf.contract.model_settings import Model as ModelSettings

Head = Literal["sequence", "token", "causal"]
"""A score for each text, scores for each token, or the next token's logits."""


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What an offline trainer is built from."""

    model: PreTrainedModel
    """With the head that the trainer asks for, on its adapter where the recipe has one; without dropout unless
    `model.dropout` keeps it."""
    tokenizer: PreTrainedTokenizerBase
    """It has a padding token."""
    train: datasets.Dataset
    """What `encode` gave of each row."""
    evaluation: datasets.Dataset | None
    """The same of the held-out rows."""
    arguments: dict[str, Any]
    """Keywords for TrainingArguments or a subclass: the recipe's `training`, and the defaults of TrainingArguments where a
    subclass may have others."""
    trainer: Callable[..., Trainer]
    """`trainer(cls, args, **options)`: a `cls`, a Trainer class, of this model, tokenizer and data, with the run's
    checkpoints and evaluation."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a trainer puts through the model, for the plan's estimate of memory."""

    texts: int = 1
    """Texts of one row, each of up to `max_length` tokens; a pair has 2."""
    packed: bool = False
    """A row of a micro-batch is `max_length` tokens of several rows, and no row is padded."""
    reference: bool = False
    """A frozen copy of the model reads every micro-batch too."""
    logits: bool = False
    """`measure` holds the logits of whole batches of a causal model; a loss never does."""


@dataclass(kw_only=True)
class OfflineTrainer(Plugin, ABC):
    """Trains a model on a dataset. Axis `trainer`."""

    axis = Axis(section="Training", metric_prefix="")

    head: ClassVar[Head]
    """Which model it trains."""
    outputs: ClassVar[int] = 1
    """How many numbers a classifier's head gives."""
    rows: ClassVar[str] = ""
    """The kind of its rows, where `builtin:addition` has them: demonstration, preference, stepwise or spans."""
    reward: ClassVar[str] = ""
    """The rewards plugin that reads the trained model, if any."""

    max_length: Count | None = 1024
    """Most tokens of a row, within the model's context (null: the context); longer rows are dropped and counted."""

    @abstractmethod
    def columns(self) -> set[str]:
        """The columns that a dataset must have. Others may be read where they are there."""

    @abstractmethod
    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        """A row as numbers and lists of them, the longest of which is its length in tokens; the same keys for each row.

        None where there is nothing to learn from: such rows are dropped and counted. Raises `ValueError` where the row is
        not what `columns` promise; the core adds which row it is. Called before the model is loaded.
        """

    def problems(self, model: ModelSettings) -> Iterable[str]:
        """Reasons why the model cannot be trained as the recipe's `model` says, each saying what to write instead. Asked before
        anything is loaded."""
        return ()

    @abstractmethod
    def build(self, materials: Materials) -> Trainer:
        """What `materials.trainer` gives for a class of transformers or TRL and its arguments."""

    def footprint(self, adapter: bool) -> Footprint:
        """What the plan's estimate of memory and its arithmetic go by. `adapter`: one is trained in place of the model."""
        return Footprint()

    def measure(self, trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
        """Metrics on held-out examples, equal on every process, logged under `eval_` with every evaluation and written into
        summary.json. `name_low` and `name_high` are the ends of the 95 % interval of `name`. The model is in eval mode."""
        return {}
