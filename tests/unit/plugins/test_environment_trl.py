"""Environment `trl`: classes in the form that TRL documents, unchanged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Over, Task


class Counter:
    """Count to the row's goal."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def reset(self, goal: int = 2, **row) -> str | None:
        self.row, self.goal, self.count = row, goal, 0
        return f" Count to {goal}."

    def increment(self, step: int) -> int:
        """Add to the count.

        Args:
            step: How much.
        """
        if step < 1:
            raise ValueError("step must be positive")
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return float(self.count == self.goal)

    def _hidden(self):
        return None


class Guess:
    """An async game without a reward of its own."""

    def reset(self, **row) -> None:
        self.secret = row["secret"]

    async def guess(self, word: str) -> str:
        """Guess the word.

        Args:
            word: The guess.
        """
        return "right" if word == self.secret else "wrong"


def calls(*given):
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in given]
    return {"role": "assistant", "content": "", "tool_calls": made}


DONE = {"role": "assistant", "content": "done"}


def play(environment, /, *answers, **columns):
    """Play an episode in which the policy gives these answers; returns the outcome and what it was asked with."""
    left, asked = list(answers), []

    def model(messages, *, tools=None, **options):
        asked.append(([dict(message) for message in messages], [tool["function"]["name"] for tool in tools]))
        if not left:
            raise Over
        return left.pop(0)

    task = Task(messages=[{"role": "user", "content": "Go."}], columns=columns, seed=0)
    return environment.play(task, model), asked


def results(asked):
    return [message["content"] for message in asked[-1][0] if message["role"] == "tool"]


@pytest.mark.proves("environment.trl", how="closed form", tolerance="exact")
def test_methods_are_tools_reset_adds_to_the_prompt_and_the_reward_is_the_environments():
    environment = load_plugin("environment", "trl", factory=Counter)
    outcome, asked = play(environment, calls(("increment", {"step": 1})), calls(("increment", {"step": 1})), DONE)
    assert asked[0] == ([{"role": "user", "content": "Go. Count to 2."}], ["increment"])
    assert results(asked) == ["1", "2"]
    assert (outcome.reward, outcome.columns["calls"]) == (1.0, 2)


def test_the_row_is_what_reset_gets():
    environment = load_plugin("environment", "trl", factory=Counter)
    outcome, asked = play(environment, DONE, goal=0, other="x")
    assert asked[0][0][-1]["content"] == "Go. Count to 0."
    assert outcome.reward == 1.0
    assert environment._idle[None][-1].row == {"prompt": [{"role": "user", "content": "Go."}], "other": "x"}


def test_failures_and_unknown_tools_are_observed_and_hidden_methods_are_no_tools():
    environment = load_plugin("environment", "trl", factory=Counter)
    asks = [("increment", {"step": 0}), ("_hidden", {}), ("reset", {}), ("get_reward", {})]
    outcome, asked = play(environment, calls(*asks), DONE)
    first, *others = results(asked)
    assert first == "error: ValueError: step must be positive"
    assert all("there is no tool" in text for text in others)
    assert (outcome.reward, outcome.columns["failed_calls"]) == (0.0, 4)


def test_sync_calls_of_one_turn_run_in_their_order():
    outcome, asked = play(
        load_plugin("environment", "trl", factory=Counter), calls(*[("increment", {"step": 1})] * 3), DONE
    )
    assert results(asked) == ["1", "2", "3"]
    assert outcome.reward == 0.0


def test_an_episode_out_of_turns_is_scored():
    outcome, _ = play(load_plugin("environment", "trl", factory=Counter), calls(("increment", {"step": 2})))
    assert outcome.reward == 1.0


def test_instances_are_made_once_and_reset_often():
    environment = load_plugin("environment", "trl", factory=Counter)
    before = Counter.made
    for _ in range(3):
        outcome, _ = play(environment, calls(("increment", {"step": 2})), DONE)
        assert outcome.reward == 1.0
    assert Counter.made == before + 1


def test_of_several_factories_the_row_names_one(tmp_path):
    environment = load_plugin("environment", "trl", factory={"count": Counter, "guess": Guess})
    assert environment.columns() == {"environment"}
    outcome, asked = play(
        environment, calls(("guess", {"word": "b"}), ("guess", {"word": "a"})), DONE, environment="guess", secret="a"
    )
    assert asked[0] == ([{"role": "user", "content": "Go."}], ["guess"])
    assert results(asked) == ["wrong", "right"]
    assert outcome.reward is None
    outcome, asked = play(environment, DONE, environment="count", goal=0)
    assert (outcome.reward, asked[0][1]) == (1.0, ["increment"])
    with pytest.raises(ValueError, match="column 'environment' must be one of 'count', 'guess', got 'x'"):
        play(environment, DONE, environment="x")


def test_a_class_of_a_file_and_an_async_reward(tmp_path):
    file = tmp_path / "my.py"
    file.write_text(
        "class Game:\n    def reset(self, **row):\n        return None\n    async def get_reward(self):\n        return 0.5\n"
    )
    outcome, asked = play(load_plugin("environment", "trl", factory=f"{file}:Game"), DONE)
    assert (outcome.reward, asked[0][1]) == (0.5, [])


class WithoutReset:
    pass


class WithoutTypes:
    def reset(self, **row):
        return None

    def act(self, x):
        return x


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (WithoutReset, "factory WithoutReset must make instances with a method reset"),
        (WithoutTypes, "tool 'act' must have type hints and a docstring"),
        ("nowhere.py:Class", "factory 'nowhere.py:Class': cannot load nowhere.py"),
    ],
)
def test_classes_of_another_form_are_refused(factory, words):
    (problem,) = load_plugin("environment", "trl", factory=factory).check(SimpleNamespace())
    assert words in problem
