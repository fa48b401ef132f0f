"""Base class of the axis `reference`: what a KL is measured against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_rlhf.batch import ReferenceRows, Rollouts
from hf_rlhf.contract import outputs
from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Plugin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Reference(Plugin, ABC):
    """Reference of the KL. Axis `reference`, also nested in a `kl`. One that `moves` is saved in every checkpoint."""

    axis = Axis(section="Reference", metric_prefix="reference", outputs=outputs.REFERENCE)

    provides: ClassVar[frozenset[str]] = frozenset({"ref_logps"})
    scores: ClassVar[frozenset[str]] = frozenset({"logps", "top_logps", "distributions"})
    """Values of `needs` that `score` answers."""
    moves: ClassVar[bool] = False
    follows_policy: ClassVar[bool] = False
    """True if it is the policy at any moment, without a model of its own."""

    @property
    def base(self) -> Reference:
        """The reference whose model scores: itself, or one that it wraps."""
        return self

    @property
    def known_tokens(self) -> int | None:
        """Number of token ids, from 0, that mean to it what they mean to the policy; None: all that both have."""
        return None

    def token_problems(self, tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
        """Yield reasons why it cannot score tokens of the policy's tokenizer. Called before any model is loaded."""
        return ()

    @abstractmethod
    def build(self, policy: PreTrainedModel) -> torch.nn.Module | None:
        """Return the reference model, or None if the policy itself serves (see `active`), or no model does (see `score`).

        Where references of equal class and settings are used several times, the first one's model serves all.
        """

    def active(self, policy: PreTrainedModel) -> Any:
        """Return a context in which the policy computes the reference's log-probs, if `build` returns None."""
        raise TypeError(f"reference.{self.name} builds no model and does not define active")

    def move(self, model: torch.nn.Module, policy: PreTrainedModel, step: int) -> None:
        """Update the reference `model` after optimizer step `step` (from 1), if `moves` is True."""

    def prompts(
        self, rollouts: Rollouts, scores: Mapping[str, Sequence[float | None]] | None = None
    ) -> list[list[int]] | None:
        """Return the tokens of the prompts that it reads in place of the rows' own; None: it reads those.

        Called once per rollout with all rows of this process, whole groups; after the rewards, with the score of each source and
        the `total` of each row, if `needs` names scores.
        """
        return None

    def score(self, rows: ReferenceRows, needs: frozenset[str], top_k: int | None = None) -> dict[str, Any]:
        """Return what `needs` names of each sampled token of `rows`, without gradient, at `rows.temperature`.

        `logps`: log-probs (B, T). `top_logps`: log-probs of the `top_k` likeliest tokens in falling order (B, T, k), and
        `top_ids`, their ids. Both 0 off the mask. `distributions`: a function from a slice of the sampled tokens, counted row by
        row, to the log-probs of the whole vocabulary (c, V). By default the model of `build` is run once for all of them.
        """
        return rows.by_model(needs, top_k)
