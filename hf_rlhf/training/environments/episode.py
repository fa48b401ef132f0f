"""One episode: what the environment asks of the policy, what it may still use, and what came of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf.batch import Prompt
from hf_rlhf.contract.environment import AGENT, POLICY, Environment, Message, Outcome, Over, Task
from hf_rlhf.data.transcript import Transcript, TranscriptRow, conversation_hash

KEPT = {"agent", "reward", "turn_rewards", "turn_ends", "turn_states", "environment", "end"}
"""Names of columns that the host writes for each row."""


class EnvironmentFailure(ValueError):
    """Raised for an environment that breaks its contract, or that fails in every episode."""


@dataclass(kw_only=True)
class Question:
    """Tokens that the policy is to continue."""

    episode: Episode
    prompt: Prompt
    agent: str = POLICY
    row: int = 0
    train: bool = True
    state: str = ""
    """Hash of the conversation, if something reads the states of turns."""


@dataclass(kw_only=True)
class Reply:
    """Tokens that the policy sampled."""

    ids: list[int]
    logps: list[float] | None
    finish_reason: str

    def cut(self, prompt: Prompt, decode: Callable[[list[int]], str]) -> Reply:
        """Return what the bounds of a prompt leave of it, which an engine need not know of."""
        most, stop = prompt.max_new_tokens, prompt.stop
        ids, reason = self.ids, self.finish_reason
        if most is not None and len(ids) > most:
            ids, reason = ids[:most], "length"
        if stop and _has(stop, decode(ids)):
            ids = ids[: bisect_left(range(len(ids)), True, key=lambda i: _has(stop, decode(ids[: i + 1]))) + 1]
            reason = "stop"
        logps = None if self.logps is None else self.logps[: len(ids)]
        return Reply(ids=ids, logps=logps, finish_reason=reason)


def _has(stop: Sequence[str], text: str) -> bool:
    return any(word in text for word in stop)


@dataclass(kw_only=True)
class Agent:
    """One agent of an episode, which becomes a row."""

    name: str
    transcript: Transcript
    prompt: str | list[Message]
    """The first question."""
    start: int
    """Number of tokens of that question."""
    turns: list[int] = field(default_factory=list)
    """Numbers of its turns in the episode."""
    finish_reason: str = "stop"


@dataclass(kw_only=True)
class Episode:
    """An episode, or a row that no environment takes (`environment` is None), which is answered once."""

    place: int
    """Place among the episodes of this process."""
    group: int
    prompt: Prompt
    environment: Environment | None
    task: Task
    transcript: Callable[[], Transcript]
    """Makes the transcript of an agent."""
    turn_tokens: int | None
    """Most tokens of a turn: the engine's `max_new_tokens`."""
    observes: bool = False
    """True if something reads the states of turns."""
    observed: list[str] = field(default_factory=list)
    """Hash of the conversation with which each turn was asked for, if it `observes`."""
    agents: dict[str, Agent] = field(default_factory=dict)
    """Agents that were asked, by name."""
    turns: int = 0
    pending: int = 0
    """Number of questions without an answer."""
    outcome: Outcome = field(default_factory=Outcome)
    problem: str = ""
    """Reason for no outcome: over, error or timeout; empty where it has one."""
    reason: str = ""
    reply: Reply | None = None
    """The only answer of a row that no environment takes."""

    def ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        max_tokens: int | None,
        stop: Sequence[str] | None,
        agent: str,
        train: bool,
    ) -> Question:
        """Return what the engine is to continue. Raises `Over` where nothing is left."""
        assert self.environment is not None
        if agent not in self.environment.agents:
            raise EnvironmentFailure(
                f"environment={self.environment.name} asks as agent={agent!r}, which must be one of its agents "
                f"({', '.join(self.environment.agents)}). Name it in agents, or ask as one of them"
            )
        if self.turns + self.pending >= self.environment.max_turns:
            raise Over
        known = self.agents.get(agent)
        transcript = self.transcript() if known is None else known.transcript
        asked = transcript.ask(list(messages), tools)
        first = asked.ids == self.prompt.ids
        if known is None:
            said = self.prompt.prompt if first or agent == POLICY else transcript.as_prompt(messages)
            known = self.agents[agent] = Agent(name=agent, transcript=transcript, prompt=said, start=len(asked.ids))
        room = self.environment.max_tokens - max(0, len(asked.ids) - known.start)
        if room < 1:
            raise Over
        most = min(x for x in (room, max_tokens, self.turn_tokens) if x is not None)
        prompt = Prompt(
            ids=asked.ids,
            prompt=self.prompt.prompt if first else list(messages),
            columns={**self.prompt.columns, AGENT: agent} if len(self.environment.agents) > 1 else self.prompt.columns,
            opening=self.prompt.opening if first else "",
            max_new_tokens=most,
            stop=tuple(stop or ()),
        )
        self.pending += 1
        state = conversation_hash(messages) if self.observes else ""
        return Question(episode=self, prompt=prompt, agent=agent, row=asked.row, train=train, state=state)

    def answer(self, question: Question, reply: Reply) -> Message:
        """Keep what was sampled, and return it as a message."""
        agent, reason = self.agents[question.agent], reply.finish_reason
        message = agent.transcript.answer(question.row, reply.ids, reply.logps, reason, train=question.train)
        message |= {"finish_reason": reason, "turn": self.turns}
        self.observed.append(question.state)
        agent.turns.append(self.turns)
        agent.finish_reason = reason
        self.turns += 1
        self.pending -= 1
        return message

    def rows(self) -> list[tuple[Agent, TranscriptRow]]:
        """Return its agents with their rows, in the order in which they were asked: those with a turn that trains, or else the
        first with a turn."""
        spoke = [agent for agent in self.agents.values() if agent.turns]
        learners = [agent for agent in spoke if agent.transcript.trains] or spoke[:1]
        made = ((agent, agent.transcript.row) for agent in learners)
        return [(agent, row) for agent, row in made if row is not None]

    def end(self, given: Any) -> None:
        """Take what `play` returned. Raises `EnvironmentFailure` for anything but an outcome, a number or None."""
        assert self.environment is not None
        owner = f"environment={self.environment.name}"
        outcome = given if isinstance(given, Outcome) else Outcome(reward=given)
        given_rewards = outcome.reward if isinstance(outcome.reward, dict) else {"": outcome.reward}
        if isinstance(outcome.reward, dict) and (unknown := given_rewards.keys() - set(self.environment.agents)):
            raise EnvironmentFailure(
                f"{owner} must reward its agents ({', '.join(self.environment.agents)}), got {sorted(map(str, unknown))}"
            )
        try:
            rewards = {name: None if x is None else float(x) for name, x in given_rewards.items()}
        except (TypeError, ValueError):
            raise EnvironmentFailure(
                f"{owner}: play must return an Outcome, a number or None, got {given!r:.80}"
            ) from None
        if outcome.turns is not None and len(outcome.turns) != self.turns:
            raise EnvironmentFailure(
                f"{owner}: Outcome.turns must have one Turn for each turn of the policy ({self.turns}), got {len(outcome.turns)}"
            )
        numbers = [*rewards.values(), *(turn.reward for turn in outcome.turns or ())]
        if not all(x is None or math.isfinite(x) for x in numbers):
            raise EnvironmentFailure(f"{owner}: rewards must be finite numbers, or None for no score, got {numbers}")
        if taken := KEPT & outcome.columns.keys():
            raise EnvironmentFailure(
                f"{owner}: Outcome.columns must have other names than {', '.join(sorted(KEPT))}, got {', '.join(sorted(taken))}"
            )
        reward: Any = rewards if isinstance(outcome.reward, dict) else rewards[""]
        self.outcome = Outcome(reward=reward, turns=outcome.turns, columns=dict(outcome.columns))

    def fail(self, kind: str, reason: str) -> None:
        """Note that it has no outcome; `on_error` may give one to an error or a timeout."""
        assert self.environment is not None
        self.problem, self.reason, given = kind, reason, self.environment.on_error
        if kind == "over":
            for agent in self.agents.values():
                agent.finish_reason = "length"
        elif not isinstance(given, str):
            self.outcome = Outcome(reward=float(given))

    def reward_of(self, agent: str) -> float | None:
        """Return the reward of the whole episode for one agent."""
        given = self.outcome.reward
        return given.get(agent) if isinstance(given, dict) else given

    @property
    def states(self) -> list[str]:
        """Return the state in which each turn began, as the environment names it, or else what was observed."""
        if self.reply is not None:
            return [""]
        named = [turn.state for turn in self.outcome.turns] if self.outcome.turns else [None] * self.turns
        return [seen if name is None else f"named {name}" for name, seen in zip(named, self.observed, strict=True)]
