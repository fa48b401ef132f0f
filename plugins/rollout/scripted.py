"""Completions from the dataset: a test double, and a way to train on completions generated elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import RolloutEngine
from hf_rlhf.batch import Completions

if TYPE_CHECKING:
    from hf_rlhf.axes import Policy
    from hf_rlhf.batch import Prompt


@dataclass(kw_only=True)
class Scripted(RolloutEngine):
    """Returns the completions in each prompt's dataset row."""

    name = "scripted"

    column: str = "completions"
    """Column with a list of completions, each a text (the end-of-sequence token is added) or a list of token ids."""
    mask_column: str | None = None
    """Column with a list of 0/1 lists, 0 on tokens written by a tool; None: all 1."""
    logps_column: str | None = None
    """Column with a list of lists of the sampler's log-probs; None: not reported."""

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """`sampler_logps` if the dataset has them."""
        return frozenset({"sampler_logps"} if self.logps_column else ())

    def columns(self) -> set[str]:
        """Return the required dataset columns."""
        return {self.column, self.mask_column or self.column, self.logps_column or self.column}

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        """Return the first `num_generations` completions of each row; `temperature` has no effect."""
        ids: list[list[int]] = []
        masks: list[list[int]] = []
        logps: list[list[float]] = []
        for prompt in prompts:
            scripts = prompt.columns[self.column]
            if len(scripts) < num_generations:
                raise ValueError(
                    f"rollout=scripted: column {self.column!r} must have at least {num_generations} completions per row, "
                    f"got {len(scripts)}. Lower rollout.num_generations or add completions"
                )
            ids += [self._tokens(policy, script) for script in scripts[:num_generations]]
            if self.mask_column:
                masks += [list(mask) for mask in prompt.columns[self.mask_column][:num_generations]]
            if self.logps_column:
                logps += [list(row) for row in prompt.columns[self.logps_column][:num_generations]]
        stops = [row[-1] == policy.tokenizer.eos_token_id for row in ids]
        reasons = ["stop" if stop else "length" for stop in stops]
        return Completions(ids=ids, masks=masks or None, finish_reasons=reasons, logps=logps or None)

    def _tokens(self, policy: Policy, script: Any) -> list[int]:
        if not isinstance(script, str):
            return list(script)
        eos = policy.tokenizer.eos_token_id
        return [*policy.tokenizer(script, add_special_tokens=False)["input_ids"], *([] if eos is None else [eos])]


@hookimpl
def rollout() -> list[type[RolloutEngine]]:
    return [Scripted]
