"""Completions that stand in the dataset: a test double, and a way to train on completions made elsewhere."""

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
    """Gives each prompt the completions of its row."""

    name = "scripted"

    column: str = "completions"
    """Column with a list of completions, each a text (the end-of-sequence token is added) or a list of token ids."""
    mask_column: str | None = None
    """Column with a list of 0/1 lists, 0 on tokens that a tool wrote; all 1 when left out."""
    logps_column: str | None = None
    """Column with a list of lists of log-probs, as whoever sampled the completions reports them; none when left out."""

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """The sampler's log-probs where the dataset has them."""
        return frozenset({"sampler_logps"} if self.logps_column else ())

    def columns(self) -> set[str]:
        """The dataset columns that must be there."""
        return {self.column, self.mask_column or self.column, self.logps_column or self.column}

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        """The first `num_generations` completions of each row; `temperature` has nothing to act on."""
        ids: list[list[int]] = []
        masks: list[list[int]] = []
        logps: list[list[float]] = []
        for prompt in prompts:
            scripts = prompt.columns[self.column]
            if len(scripts) < num_generations:
                raise ValueError(
                    f"rollout=scripted: a row's column {self.column!r} holds {len(scripts)} completions and "
                    f"{num_generations} are asked for; lower rollout.num_generations or add completions"
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
