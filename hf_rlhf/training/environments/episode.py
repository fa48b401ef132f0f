"""One episode: what the environment asks of the policy, what it may still use, and what came of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf.batch import Prompt
from hf_rlhf.contract.environment import Environment, Message, Outcome, Over, Task
from hf_rlhf.data.transcript import Transcript, conversation_hash

POLICY = "policy"
"""The agent that the policy is."""


class EnvironmentFailure(ValueError):
    """Raised for an environment that breaks its contract, or that fails in every episode."""


@dataclass(kw_only=True)
class Question:
    """Tokens that the policy is to continue."""

    episode: Episode
    prompt: Prompt
    row: int = 0
    stop: Sequence[str] = ()
    train: bool = True
    state: str = ""
    """Hash of the conversation, if something reads the states of turns."""


@dataclass(kw_only=True)
class Reply:
    """Tokens that the policy sampled."""

    ids: list[int]
    logps: list[float] | None
    finish_reason: str

    def cut(self, most: int | None, stop: Sequence[str], decode: Callable[[list[int]], str]) -> Reply:
        """Return its first `most` tokens, or those up to the first text in `stop`, which an engine need not know of."""
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
class Episode:
    """An episode of one row, or a row that no environment takes (`environment` is None), which is answered once."""

    place: int
    """Place among the episodes of this process."""
    group: int
    prompt: Prompt
    environment: Environment | None
    task: Task
    transcript: Transcript
    turn_tokens: int | None
    """Most tokens of a turn: the engine's `max_new_tokens`."""
    observes: bool = False
    """True if something reads the states of turns."""
    observed: list[str] = field(default_factory=list)
    """Hash of the conversation with which each turn was asked for, if it `observes`."""
    turns: int = 0
    finish_reason: str = "stop"
    outcome: Outcome = field(default_factory=Outcome)
    problem: str = ""
    """Reason for no outcome: over, error or timeout; empty where it has one."""
    reason: str = ""
    start: int = 0
    """Tokens of the first question."""
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
        if agent != POLICY:
            raise EnvironmentFailure(
                f"environment={self.environment.name} asks as agent={agent!r}: an episode has one agent in this version. Leave "
                f"agent out, or play the other roles in the environment"
            )
        if self.turns >= self.environment.max_turns:
            raise Over
        asked = self.transcript.ask(list(messages), tools)
        if asked.row > 0:
            raise EnvironmentFailure(
                f"environment={self.environment.name}: turn {self.turns + 1} of an episode is asked with a conversation that is "
                "not the one so far with messages added, which makes a second row of the episode. Estimators would count it "
                "as an episode, so this version refuses it: only add messages"
            )
        if self.turns == 0:
            self.start = len(asked.ids)
        room = self.environment.max_tokens - (len(asked.ids) - self.start)
        if room < 1:
            raise Over
        most = min(x for x in (room, max_tokens, self.turn_tokens) if x is not None)
        first = self.turns == 0 and asked.ids == self.prompt.ids
        prompt = Prompt(
            ids=asked.ids,
            prompt=self.prompt.prompt if first else list(messages),
            columns=self.prompt.columns,
            opening=self.prompt.opening if first else "",
            max_new_tokens=most,
        )
        state = conversation_hash(messages) if self.observes else ""
        return Question(episode=self, prompt=prompt, row=asked.row, stop=stop or (), train=train, state=state)

    def answer(self, question: Question, reply: Reply) -> Message:
        """Keep what was sampled, and return it as a message."""
        reason = reply.finish_reason
        message = self.transcript.answer(question.row, reply.ids, reply.logps, reason, train=question.train)
        message |= {"finish_reason": reason, "turn": self.turns}
        self.observed.append(question.state)
        self.turns, self.finish_reason = self.turns + 1, reason
        return message

    def end(self, given: Any) -> None:
        """Take what `play` returned. Raises `EnvironmentFailure` for anything but an outcome, a number or None."""
        assert self.environment is not None
        owner = f"environment={self.environment.name}"
        outcome = given if isinstance(given, Outcome) else Outcome(reward=given)
        reward = outcome.reward
        if isinstance(reward, dict):
            if reward.keys() - {POLICY}:
                raise EnvironmentFailure(
                    f"{owner} must reward the agent {POLICY!r} alone in this version, got {sorted(reward)}"
                )
            reward = reward.get(POLICY)
        if reward is not None:
            try:
                reward = float(reward)
            except (TypeError, ValueError):
                raise EnvironmentFailure(
                    f"{owner}: play must return an Outcome, a number or None, got {given!r:.80}"
                ) from None
        if outcome.turns is not None and len(outcome.turns) != self.turns:
            raise EnvironmentFailure(
                f"{owner}: Outcome.turns must have one Turn for each turn of the policy ({self.turns}), got {len(outcome.turns)}"
            )
        numbers = [reward, *(turn.reward for turn in outcome.turns or ())]
        if not all(x is None or math.isfinite(x) for x in numbers):
            raise EnvironmentFailure(f"{owner}: rewards must be finite numbers, or None for no score, got {numbers}")
        self.outcome = Outcome(reward=reward, turns=outcome.turns, columns=dict(outcome.columns))

    def fail(self, kind: str, reason: str) -> None:
        """Note that it has no outcome; `on_error` may give one to an error or a timeout."""
        assert self.environment is not None
        self.problem, self.reason, given = kind, reason, self.environment.on_error
        if kind == "over":
            self.finish_reason = "length"
        elif not isinstance(given, str):
            self.outcome = Outcome(reward=float(given))

    @property
    def states(self) -> list[str]:
        """Return the state in which each turn began, as the environment names it, or else what was observed."""
        if self.reply is not None:
            return [""]
        named = [turn.state for turn in self.outcome.turns] if self.outcome.turns else [None] * self.turns
        return [seen if name is None else f"named {name}" for name, seen in zip(named, self.observed, strict=True)]

    @property
    def unscored(self) -> bool:
        """Return whether no reward source scores it."""
        return bool(self.problem) and self.outcome.reward is None
