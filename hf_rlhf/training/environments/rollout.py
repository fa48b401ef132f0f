"""Roll out prompts through the environments of a recipe: episodes become rows of completions."""

from __future__ import annotations

import copy
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import count, groupby
from typing import Any

from hf_rlhf.axes import Session
from hf_rlhf.batch import Completions, Prompt, Rollouts
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.chat import messages_of
from hf_rlhf.contract.environment import AGENT, POLICY, Environment, Message, Task, agents_of
from hf_rlhf.data.transcript import Transcript, TranscriptRow
from hf_rlhf.data.turn_rendering import turns_of
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.seeding import seed_of, seeded
from hf_rlhf.scoring.runners.isolation import isolated
from hf_rlhf.scoring.scorer import applies, copied
from hf_rlhf.training.completion_checks import check_completions
from hf_rlhf.training.environments.episode import Agent, EnvironmentFailure, Episode, Question, Reply
from hf_rlhf.training.environments.free_play import FreePlay
from hf_rlhf.training.environments.lockstep import Lockstep

logger = logging.getLogger(__name__)
Numbers = defaultdict[int, defaultdict[tuple[str, int], int]]
"""Episode -> agent and conversation -> number by which the engine knows it from turn to turn."""
FEW = 8
"""Episodes of an environment from which on a rollout without one that succeeds ends the run."""


@dataclass(kw_only=True)
class Played:
    """Rows of episodes, in the order of the prompts: one for each agent of an episode."""

    completions: Completions
    prompts: list[str | list[Message]]
    """First question of each row's agent."""
    prompt_ids: list[list[int]]
    messages: list[list[Message]]
    reasons: list[str]
    """Reason of each row whose episode failed, else empty."""
    waited: float
    """Seconds in which the engine waited for environments."""
    overridden: int
    """Sampling arguments of agents' requests that differed from the recipe's."""


@dataclass(kw_only=True)
class Players:
    """The environments of a recipe around its engine."""

    algorithm: Algorithm
    policy: Policy
    autocast: Callable[[], AbstractContextManager[Any]]
    _sampled: bool = True
    """True at the temperature of the recipe."""
    _turn: int = 0
    _exact: bool = True
    _reports: bool = True
    _warned: set[str] = field(default_factory=set)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group_ids: Sequence[int],
        group: int,
        temperature: float | None,
        place: tuple[int | str, ...],
        process: tuple[int | str, ...],
    ) -> Played:
        """Play `group` episodes of each prompt.

        A task's seed depends on `place`, its group and its row there; the engine's random numbers also on `process` and, after
        the first, on the turn.
        """
        self._sampled, self._turn, self._exact, self._reports = temperature is None, 0, True, True
        openings = [cache(partial(self._opening, prompt)) for prompt in prompts]
        episodes = [
            self._episode(prompt, i * group + k, number, (*place, number, k), openings[i])
            for i, (prompt, number) in enumerate(zip(prompts, group_ids, strict=True))
            for k in range(group)
        ]
        fresh = count().__next__
        numbers: Numbers = defaultdict(lambda: defaultdict(fresh))
        table: Lockstep
        if self.algorithm.rollout.samples_freely:
            table = FreePlay(lambda asked: self._sample(asked, numbers, temperature))
            with isolated():
                table.play(episodes)
        else:
            with isolated(), self.algorithm.rollout.session(self.policy, temperature=temperature) as session:

                def drop(episode: int) -> None:
                    for number in numbers.pop(episode, {}).values():
                        session.drop(number)

                table = Lockstep(lambda asked: self._decode(session, asked, numbers, (*place, *process)), drop)
                table.play(episodes)
        self._judge(episodes, table.trace)
        self._warn(table.endpoint.overridden)
        return self._played(episodes, table)

    def _episode(
        self, prompt: Prompt, place: int, group: int, seed: tuple[int | str, ...], opening: Callable[[], str]
    ) -> Episode:
        messages = _messages(prompt)
        taker = next((environment for environment in self.algorithm.environment if _takes(environment, prompt)), None)
        columns = {name: copied(value) for name, value in prompt.columns.items()}
        task = Task(messages=messages, columns=columns, seed=seed_of(*seed))
        return Episode(
            place=place,
            group=group,
            prompt=prompt,
            environment=taker,
            task=task,
            transcript=lambda: Transcript(
                tokenizer=self.policy.tokenizer,
                messages=messages,
                prompt_ids=prompt.ids,
                text=isinstance(prompt.prompt, str),
                history=taker.history if taker else "extend",
                opening=opening,
            ),
            turn_tokens=getattr(self.algorithm.rollout, "max_new_tokens", None),
            observes="states" in self.algorithm.needs,
        )

    def _opening(self, prompt: Prompt) -> str:
        """Return the text of a prompt."""
        messages = messages_of(_messages(prompt), "the task")
        return turns_of(self.policy.tokenizer, isinstance(prompt.prompt, str)).opening(messages, None)

    def _decode(
        self, session: Session, asked: list[Question], numbers: Numbers, seed: tuple[int | str, ...]
    ) -> list[Reply]:
        """Let the engine continue all questions; adjacent ones of a group with equal tokens are one prompt.

        They are where every prompt then has equally many, as in the first turn; otherwise each question is a prompt of its own.
        """
        runs = [
            list(run)
            for _, run in groupby(
                asked, key=lambda q: (q.episode.group, q.agent, q.prompt.ids, q.prompt.max_new_tokens, q.prompt.stop)
            )
        ]
        sizes = {len(run) for run in runs}
        prompts, each = (
            ([run[0].prompt for run in runs], sizes.pop()) if len(sizes) == 1 else ([q.prompt for q in asked], 1)
        )
        rows = [numbers[q.episode.place][q.agent, q.row] for q in asked]
        with seeded(*seed, *(("turn", self._turn) if self._turn else ())), self.autocast():
            found = session.ask(rows, prompts, each)
        self._turn += 1
        return self._replies(asked, found)

    async def _sample(self, asked: Question, numbers: Numbers, temperature: float | None) -> Reply:
        """Let the engine continue one question, from a seed of its own."""
        row = numbers[asked.episode.place][asked.agent, asked.row]
        seed = seed_of("sample", asked.episode.task.seed, asked.agent, asked.row, len(asked.prompt.ids))
        prompt = replace(asked.prompt, seed=seed)
        found = await self.algorithm.rollout.sample(self.policy, row, prompt, temperature=temperature)
        return self._replies([asked], found)[0]

    def _replies(self, asked: list[Question], found: Completions) -> list[Reply]:
        """Check what the engine sampled, and return it by question."""
        check_completions(self.algorithm, found, len(asked), self._sampled, self.policy.version)
        self._exact, self._reports = self._exact and found.exact, self._reports and found.logps is not None
        if found.masks is not None and any(not all(mask) for mask in found.masks):
            raise EnvironmentFailure(
                f"rollout={self.algorithm.rollout.name} writes tokens of its own into completions (Completions.masks), which no "
                "turn of an episode may have: choose another engine, or leave environment out"
            )
        logps: Sequence[list[float] | None] = found.logps or [None] * len(found.ids)
        replies = zip(asked, found.ids, logps, found.finish_reasons, strict=True)
        return [
            Reply(ids=list(ids), logps=own, finish_reason=why).cut(q.prompt, self._text) for q, ids, own, why in replies
        ]

    def _text(self, ids: list[int]) -> str:
        return str(self.policy.tokenizer.decode(ids, skip_special_tokens=True))

    def _judge(self, episodes: Sequence[Episode], trace: str) -> None:
        """Log failures, and end a run of whose episodes none succeeds. Raises `EnvironmentFailure`."""
        for environment in self.algorithm.environment:
            own = [episode for episode in episodes if episode.environment is environment]
            failed = [episode for episode in own if episode.problem in ("error", "timeout")]
            if not failed:
                continue
            logger.warning(
                "environment=%s: %d of %d episodes failed: the first %s\n%s",
                *(environment.name, len(failed), len(own), failed[0].reason, trace),
            )
            if len(failed) == len(own) >= FEW:
                raise EnvironmentFailure(
                    f"environment={environment.name}: all {len(own)} episodes failed: the first {failed[0].reason}. Mend the "
                    "environment, or raise its timeout"
                )

    def _warn(self, overridden: Counter[str]) -> None:
        """Log, once per name, that agents ask for another way of sampling than the recipe's."""
        new = sorted(overridden.keys() - self._warned)
        self._warned |= overridden.keys()
        if new:
            logger.warning(
                "agents set %s in their requests, which the recipe's sampling overrides (environment/overridden counts them)",
                ", ".join(new),
            )

    def _played(self, episodes: Sequence[Episode], table: Lockstep) -> Played:
        rows = [(episode, *row) for episode in episodes for row in self._rows(episode)]
        turns = [None if e.outcome.turns is None else [e.outcome.turns[i] for i in agent.turns] for e, agent, _ in rows]
        columns: dict[str, list[Any]] = {
            AGENT: [agent.name for _, agent, _ in rows],
            "episode/reward": [episode.reward_of(agent.name) for episode, agent, _ in rows],
            "episode/turn_rewards": [None if own is None else [turn.reward for turn in own] for own in turns],
            "episode/turn_ends": [_ends(row.turns) for *_, row in rows],
            "episode/environment": [e.environment and e.environment.name for e, *_ in rows],
            "episode/end": [episode.problem or "played" for episode, *_ in rows],
        }
        if "states" in self.algorithm.needs:
            columns["episode/turn_states"] = [[e.states[i] for i in agent.turns] for e, agent, _ in rows]
        own = sorted({name for episode in episodes for name in episode.outcome.columns})
        columns |= {f"episode/{name}": [episode.outcome.columns.get(name) for episode, *_ in rows] for name in own}
        agents = agents_of(self.algorithm.environment)
        return Played(
            completions=Completions(
                ids=[row.completion_ids for *_, row in rows],
                masks=[row.mask for *_, row in rows],
                finish_reasons=[agent.finish_reason for _, agent, _ in rows],
                logps=[row.logps for *_, row in rows] if self._reports else None,
                exact=self._exact,
                forks=[row.forks for *_, row in rows],
                episodes=[episode.place for episode, *_ in rows],
                agents=[agents.index(agent.name) for _, agent, _ in rows],
                columns=columns,
                versions=[self.policy.version] * len(rows),  # of every turn, which is checked
            ),
            prompts=[agent.prompt for _, agent, _ in rows],
            prompt_ids=[row.prompt_ids for *_, row in rows],
            messages=[row.messages for *_, row in rows],
            reasons=[episode.reason for episode, *_ in rows],
            waited=table.waited,
            overridden=table.endpoint.overridden.total(),
        )

    def _rows(self, episode: Episode) -> list[tuple[Agent, TranscriptRow]]:
        """Return the rows of an episode. One without a turn is a token with mask 0, which is not trained on."""
        if (reply := episode.reply) is not None:
            ids, logps, reason = reply.ids, reply.logps or [0.0] * len(reply.ids), reply.finish_reason
            mask, turns, said = [1] * len(ids), [0], [{"role": "assistant", "content": self._text(ids)}]
        elif rows := episode.rows():
            return rows
        else:
            ids, mask, logps, turns, said = [self.policy.pad_token_id], [0], [0.0], [], []
            reason = "length" if episode.problem == "over" else "stop"
        agent = Agent(
            name=POLICY,
            transcript=episode.transcript(),
            prompt=episode.prompt.prompt,
            start=len(episode.prompt.ids),
            turns=turns,
            finish_reason=reason,
        )
        row = TranscriptRow(
            prompt_ids=episode.prompt.ids,
            completion_ids=ids,
            mask=mask,
            logps=logps,
            turns=[0 if turns else -1] * len(ids),
            messages=[*episode.task.messages, *said],
        )
        return [(agent, row)]


def _messages(prompt: Prompt) -> list[Message]:
    """Return a prompt's conversation; a text is one message of the user."""
    if isinstance(prompt.prompt, str):
        return [{"role": "user", "content": prompt.prompt}]
    return copy.deepcopy(prompt.prompt)


def _takes(environment: Environment, prompt: Prompt) -> bool:
    """Return whether an environment plays the episodes of a prompt."""
    if environment.when is None:
        return True
    columns = {name: [value] for name, value in prompt.columns.items()}
    row = Rollouts(
        prompts=[], completions=[], prompt_ids=[], completion_ids=[], masks=[], finish_reasons=[], columns=columns
    )
    return applies(f"environment={environment.name}", environment.when, row, 0)


def _ends(turns: Sequence[int]) -> list[int]:
    """Return the place of the last token of each turn."""
    last = {turn: place for place, turn in enumerate(turns) if turn >= 0}
    return [last[turn] for turn in sorted(last)]
