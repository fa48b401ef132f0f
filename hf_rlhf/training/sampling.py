"""Completions of prompts, by the rollout engine alone or in episodes of environments, as reward sources see them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_rlhf.batch import Completions, Prompt, Rollouts
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.environment import agents_of
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.activity import progress
from hf_rlhf.scoring.completion_text import CompletionText
from hf_rlhf.training.completion_checks import check_completions
from hf_rlhf.training.environments.rollout import Played, Players

if TYPE_CHECKING:
    from accelerate import Accelerator

Place = tuple[int | str, ...]


@dataclass(kw_only=True)
class Sampling:
    """Sample the completions of one process' prompts."""

    algorithm: Algorithm
    policy: Policy
    accelerator: Accelerator
    waited: float = 0.0
    """Seconds of the last call in which the engine waited for environments."""
    overridden: int = 0
    """Sampling arguments of agents' requests in the last call that differed from the recipe's."""
    reasons: Sequence[str] = ()
    """Reasons of the last call's episodes that failed, else empty texts."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group_ids: list[int],
        group: int,
        temperature: float | None = None,
        place: Place = (),
        process: Place = (),
    ) -> tuple[Completions, Rollouts]:
        """Sample `group` completions of each prompt; returns them also as reward sources see them.

        `place` and `process` are the seeds of the call: what is the same on every process, and the rest.
        """
        played: Played | None = None
        if self.algorithm.environment:
            with self.gathered():
                played = self._players(prompts, group_ids, group, temperature, place, process)
            completions, self.waited, self.overridden = played.completions, played.waited, played.overridden
            self.reasons = played.reasons
        else:
            with self.accelerator.autocast(), self.gathered():
                pending = self.algorithm.rollout.start(self.policy, prompts, group, temperature=temperature)
                for landed, _ in enumerate([] if self.algorithm.rollout.local else pending, 1):
                    progress(landed, len(prompts))
                completions = pending.result()
            sampled = temperature is None
            check_completions(self.algorithm, completions, len(prompts) * group, sampled, self.policy.version)
        episodes, rows = completions.episodes or list(range(len(completions.ids))), range(len(completions.ids))
        of_row = [prompts[episode // group] for episode in episodes]
        numbers, agents = [group_ids[episode // group] for episode in episodes], completions.agents or [0] * len(rows)
        names = sorted({name for prompt in prompts for name in prompt.columns})
        prompt_ids = [list(prompt.ids) for prompt in of_row] if played is None else played.prompt_ids
        same = [ids == prompt.ids for ids, prompt in zip(prompt_ids, of_row, strict=True)]
        return completions, Rollouts(
            prompts=[prompt.prompt for prompt in of_row] if played is None else played.prompts,
            completions=self.text(prompt_ids, completions.ids),
            prompt_ids=prompt_ids,
            completion_ids=completions.ids,
            masks=completions.masks or [[1] * len(ids) for ids in completions.ids],
            finish_reasons=completions.finish_reasons,
            columns={name: [prompt.columns.get(name) for prompt in of_row] for name in names} | completions.columns,
            group_ids=[number * self.agents + agent for number, agent in zip(numbers, agents, strict=True)],
            openings=[prompt.opening if own else "" for prompt, own in zip(of_row, same, strict=True)],
            messages=[] if played is None else played.messages,
            forks=completions.forks or [],
            episode_ids=[number * group + episode % group for number, episode in zip(numbers, episodes, strict=True)],
        )

    def gathered(self) -> AbstractContextManager[Any]:
        """Give a sharded policy its weights inside the block, for an engine that reads them."""
        return self.policy.gathered() if self.algorithm.rollout.local else nullcontext()

    @cached_property
    def agents(self) -> int:
        """Number of agents of all environments."""
        return len(agents_of(self.algorithm.environment))

    @cached_property
    def text(self) -> CompletionText:
        """Decoder of completions for rewards."""
        config = getattr(self.policy.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return CompletionText(self.policy.tokenizer, self.algorithm.rollout.skip_special_tokens, ends)

    @cached_property
    def _players(self) -> Players:
        return Players(algorithm=self.algorithm, policy=self.policy, autocast=self.accelerator.autocast)
