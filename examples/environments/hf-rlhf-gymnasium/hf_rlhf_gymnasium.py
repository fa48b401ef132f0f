"""Play a Gymnasium environment with discrete actions by text: the policy reads the state and answers with an action's name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Algorithm, Environment, Outcome, Over, Task, Turn

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class Gymnasium(Environment):
    """Each turn is a step: its reward stands at the end of the turn, and the state in which the turn began is named."""

    name = "gymnasium"
    words = "{id} of Gymnasium"

    id: str
    """Id of the environment, such as FrozenLake-v1. Its package is imported and run."""
    actions: list[str]
    """Names of the actions 0, 1, ... as the policy writes them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `gymnasium.make`."""
    wrong: float = 0.0
    """Reward of a turn that names no action, after which the state is shown again."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        try:
            made = self._make()
        except ModuleNotFoundError:
            yield "environment=gymnasium needs the package gymnasium. Run pip install gymnasium"
            return
        count = getattr(made.action_space, "n", None)
        if count != len(self.actions):
            yield f"actions must name the {count} actions of {self.id}, got {len(self.actions)}"
        made.close()

    def play(self, task: Task, model: Any) -> Outcome:
        """Play in a thread, or with `workers: processes` in a process, as a step may block."""
        made, turns, messages = self._make(), list[Turn](), list(task.messages)
        try:
            shown, _ = made.reset(seed=task.seed % 2**31)
            state, ended = self._text(made, shown), False
            while not ended:
                *before, last = messages
                messages = [*before, {**last, "content": f"{last['content']}{state}"}] if not turns else messages
                answer = model(messages)
                word, reward = (answer["content"] or "").strip().lower(), self.wrong
                turns.append(Turn(reward=reward, state=state))
                if word in self.actions:
                    shown, reward, terminated, truncated, _ = made.step(self.actions.index(word))
                    turns[-1].reward, ended = float(reward), terminated or truncated
                    state = self._text(made, shown)
                messages += [answer, {"role": "user", "content": state}]
        except Over:
            ended = False
        finally:
            made.close()
        return Outcome(turns=turns, columns={"solved": bool(ended and turns[-1].reward > 0)})

    def _make(self) -> Any:
        import gymnasium

        return gymnasium.make(self.id, **self.options)

    def _text(self, made: Any, shown: Any) -> str:
        """Return the state as text: the environment's own drawing where it draws text, otherwise the observation."""
        return str(made.render()) if made.render_mode == "ansi" else f"{shown}\n"


@hookimpl
def environment() -> list[type[Environment]]:
    return [Gymnasium]
