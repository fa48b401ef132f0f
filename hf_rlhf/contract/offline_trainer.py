"""Base class of the axis `trainer`: train a model on the rows of a dataset, without rollouts.

A recipe with a `trainer` has `trainer`, `model`, `dataset` and `training`, and none of the other axes. The core reads and
encodes the rows, loads the model with its head, and runs the trainer that `build` returns; it does checkpoints, resume,
metrics and the held-out evaluation before and after.
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
    """Arguments of `OfflineTrainer.build`."""

    model: PreTrainedModel
    """Model with the trainer's head, and with an adapter if the recipe has one; without dropout unless `model.dropout`."""
    tokenizer: PreTrainedTokenizerBase
    """Tokenizer with a padding token."""
    train: datasets.Dataset
    """Encoded rows."""
    evaluation: datasets.Dataset | None
    """Encoded held-out rows."""
    arguments: dict[str, Any]
    """Keywords for TrainingArguments or a subclass: the recipe's `training`, and the defaults of TrainingArguments that a
    subclass may change."""
    trainer: Callable[..., Trainer]
    """`trainer(cls, args, **options)` makes a Trainer of class `cls` with this model, tokenizer and data, and with the run's
    checkpoints and evaluation."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Size of a trainer's forwards, for the plan's memory estimate."""

    texts: int = 1
    """Texts per row, each of up to `max_length` tokens; 2 for pairs."""
    packed: bool = False
    """True if several rows are packed into `max_length` tokens without padding."""
    reference: bool = False
    """True if a frozen copy of the model reads every micro-batch too."""
    logits: bool = False
    """True if `measure` holds the logits of whole batches of a causal model; a loss never does."""


@dataclass(kw_only=True)
class OfflineTrainer(Plugin, ABC):
    """Train a model on a dataset. Axis `trainer`."""

    axis = Axis(section="Training", metric_prefix="")

    head: ClassVar[Head]
    """Kind of model."""
    outputs: ClassVar[int] = 1
    """Outputs of a classifier's head."""
    rows: ClassVar[str] = ""
    """Kind of rows of `builtin:addition`: demonstration, preference, stepwise or spans; empty for none."""
    reward: ClassVar[str] = ""
    """Name of the rewards plugin that loads the trained model, if any."""

    max_length: Count | None = 1024
    """Maximum tokens of a row, within the model's context (null: the context); longer rows are dropped and counted."""

    @abstractmethod
    def columns(self) -> set[str]:
        """Return the columns that a dataset must have; others may be read if present."""

    @abstractmethod
    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        """Return a row as numbers and lists of numbers, with the same keys for each row.

        The longest list is the row's length in tokens. Return None for a row without anything to learn: it is dropped and
        counted. Raise `ValueError` if the row is invalid; the core adds its number. Called before the model is loaded.
        """

    def problems(self, model: ModelSettings) -> Iterable[str]:
        """Yield reasons why the recipe's `model` cannot be trained, each with what to write instead. Called before loading."""
        return ()

    @abstractmethod
    def build(self, materials: Materials) -> Trainer:
        """Return `materials.trainer(cls, args)` for a trainer class of transformers or TRL and its arguments."""

    def footprint(self, adapter: bool) -> Footprint:
        """Return the input of the plan's memory estimate. `adapter`: an adapter is trained instead of the model."""
        return Footprint()

    def measure(self, trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
        """Return metrics on held-out examples, equal on every process; the model is in eval mode.

        They are logged under `eval_` with every evaluation and written to summary.json. `name_low` and `name_high` are the
        bounds of the 95 % interval of `name`.
        """
        return {}
