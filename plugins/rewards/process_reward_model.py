"""Per-step rewards by a process reward model (arXiv:2305.20050, in reinforcement learning as in arXiv:2312.08935).

Departure: steps are defined by `delimiter` or a dataset column, not by annotators. To reduce steps to one number,
arXiv:2305.20050 (section 2.6) takes the product of their probabilities, arXiv:2312.08935 their minimum, arXiv:2408.03314
the last one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import MinLen

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts, Spans

from ._models.files import ModelFiles
from ._models.steps import Prepared, Step, by_column, by_delimiter, check_token, prepared, reduced
from ._models.token_classifier import Read, TokenModelReward, at_end

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ProcessRewardModel(TokenModelReward):
    """The model's score at the end of each step, as a reward there.

    The model is an `AutoModelForTokenClassification`, a causal model's trunk with a value head, or with `good_token` a causal
    model. A single output is the log-odds of a good step; of two outputs (as saved by TRL's PRMTrainer) the second one is
    good. Blank steps do not count; a completion without any has total 0. Rewards add up over the steps: with probabilities,
    more steps earn more, so limit their number, set `value: log_odds`, or reduce them to one number.
    """

    name = "process_reward_model"
    default_outputs: ClassVar[dict[int, int]] = {1: 0, 2: 1}

    delimiter: Annotated[str, MinLen(1)] = "\n\n"
    """Text that ends a step. It is appended to the last step if missing."""
    step_column: str | None = None
    """Dataset column with each row's steps instead of `delimiter`: a list of their end positions in characters, or of their
    texts. A row with null has no score."""
    step_token: Annotated[str, MinLen(1)] | None = None
    """Token at which the model was trained to score: it is inserted after each step, before the delimiter (" ки" for
    Math-Shepherd's model, "<extra_0>" for Qwen2.5-Math-PRM)."""
    keep_delimiter: bool = True
    """Keep the delimiter after a `step_token`; false replaces it by the token, as for Qwen2.5-Math-PRM."""
    good_token: str | int | None = None
    """For a causal language model: the token (or its id) whose logit is that of a good step ("+" for Math-Shepherd's
    model)."""
    bad_token: str | int | None = None
    """Token that competes with `good_token`; without it the logit of the good one is its log-odds."""
    value: Literal["probability", "log_odds", "logit"] = "probability"
    """Probability that the step is good, its log-odds, or the label's raw logit."""
    reduce: Literal["none", "sum", "mean", "min", "last", "product"] = "none"
    """Reduce a row's steps to one number, as a reward for the whole completion."""

    def refusals(self) -> Iterator[str]:
        yield from super().refusals()
        if self.bad_token is not None and self.good_token is None:
            yield f"{self.asker}: bad_token needs good_token. Set good_token, or remove bad_token"
        if self.reduce == "product" and self.value != "probability":
            yield f"{self.asker}: reduce=product needs probabilities. Set value: probability, or reduce: sum for log-odds"
        if not self.keep_delimiter and (self.step_token is None or self.step_column is not None):
            yield f"{self.asker}: keep_delimiter needs step_token and delimiter. Remove it"

    def columns(self) -> set[str]:
        return set() if self.step_column is None else {self.step_column}

    def load_model(self, device: torch.device) -> None:
        super().load_model(device)
        if self.step_token is not None:
            with self._session() as held:
                check_token(held.tokenizer, self.step_token, f"{self.asker}.step_token", self.model)

    def steps(self, rollouts: Rollouts) -> list[list[Step] | None]:
        """Return the steps of each row, None for a row without score. Subclasses may override it."""
        if self.step_column is None:
            return [by_delimiter(text, self.delimiter) for text in rollouts.completions]
        found: list[list[Step] | None] = []
        for row, given in enumerate(rollouts.column(self.step_column)):
            try:
                found.append(None if given is None else by_column(rollouts.completions[row], given))
            except ValueError as error:
                raise ValueError(f"{self.asker}.step_column={self.step_column!r}, row {row}: {error}") from error
        return found

    def __call__(self, rollouts: Rollouts) -> list[Spans | float | None]:
        steps = self.steps(rollouts)
        rows = [row for row, found in enumerate(steps) if found is not None]
        closing = self.delimiter if self.step_column is None else ""
        texts = {
            row: prepared(rollouts.completions[row], steps[row] or [], closing, self.step_token, self.keep_delimiter)
            for row in rows
        }
        prompts, openings = (
            [given[row] for row in rows] if given else [] for given in (rollouts.prompts, rollouts.openings)
        )
        read = self.read(prompts, [text.text for text in texts.values()], self.value, openings)
        given: list[Spans | float | None] = [None] * len(steps)
        for (row, text), tokens in zip(texts.items(), read, strict=True):
            scores = None if tokens is None else self._at_steps(text, tokens)
            if scores is not None:
                ends = [step.end for step in steps[row] or []]
                given[row] = self._answer([(end, x) for end, x in zip(ends, scores, strict=True) if x is not None])
        return given

    def _answer(self, rewards: list[tuple[int, float]]) -> Spans | float | None:
        return Spans(rewards) if self.reduce == "none" else reduced(self.reduce, [x for _, x in rewards])

    def _at_steps(self, text: Prepared, tokens: list[Read]) -> list[float | None] | None:
        """Return the score of each step, None for a truncated one; None if a step token was merged into another token."""
        found = [at_end(tokens, last) for _, last in text.places]
        if self.step_token is not None:
            within = [
                token is None or first < token.end == last
                for token, (first, last) in zip(found, text.places, strict=True)
            ]
            if not all(within):
                logger.warning(
                    "%s: %r merges step_token with a completion's text; it has no score", self.asker, self.model
                )
                return None
        return [None if token is None else token.score for token in found]

    def _wanted(self, device: torch.device) -> ModelFiles:
        wanted = super()._wanted(device)
        words = tuple(word for word in (self.bad_token, self.good_token) if word is not None)
        return wanted._replace(kind="causal", words=words) if words else wanted


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [ProcessRewardModel]
