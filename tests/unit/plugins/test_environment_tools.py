"""Environment `tools`: calls of the policy, their results, failures, the reward, and what is retried."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Over, Task
from hf_rlhf.config.recipe_yaml import RecipeError


def add(a: int, b: int) -> int:
    """Add numbers.

    Args:
        a: A number.
        b: Another one.
    """
    return a + b


async def look(word: str) -> dict:
    """Look a word up.

    Args:
        word: The word.
    """
    await asyncio.sleep(0.05)
    return {"word": word}


def fails(word: str) -> str:
    """Fail.

    Args:
        word: The word.
    """
    raise ValueError(f"no {word}")


def calls(*given):
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in given]
    return {"role": "assistant", "content": "", "tool_calls": made}


def says(text, reason="stop"):
    return {"role": "assistant", "content": text, "finish_reason": reason}


def play(environment, *answers, **columns):
    """Play an episode in which the policy gives these answers; returns the outcome and the conversations it was asked with."""
    left, asked = list(answers), []

    async def model(messages, *, tools=None, **options):
        asked.append([dict(message) for message in messages])
        if not left:
            raise Over
        assert [tool["function"]["name"] for tool in tools] == [f.__name__ for f in environment.tools]
        return left.pop(0)

    task = Task(messages=[{"role": "user", "content": "q"}], columns=columns, seed=0)
    try:
        return asyncio.run(environment.play(task, model)), asked
    finally:
        environment.close()


def tools(*functions, workers="inline", **settings):
    return load_plugin("environment", "tools", tools=list(functions), workers=workers, **settings)


def results(asked):
    return [message["content"] for message in asked[-1] if message["role"] == "tool"]


def test_results_follow_their_calls_in_order_and_a_turn_without_a_call_ends():
    outcome, asked = play(
        tools(add, look), calls(("add", {"a": 1, "b": 2}), ("look", {"word": "é"})), says("3"), says("?")
    )
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "tool", "tool"]
    assert [m["name"] for m in asked[1][2:]] == ["add", "look"]
    assert results(asked) == ["3", '{"word": "é"}']
    assert (outcome.reward, outcome.columns) == (None, {"answer": "3", "calls": 2, "failed_calls": 0})


def test_calls_of_one_turn_run_side_by_side():
    begin = time.monotonic()
    play(tools(look), calls(*[("look", {"word": "x"})] * 20), says("done"))
    assert time.monotonic() - begin < 20 * 0.05


@pytest.mark.parametrize(
    ("call", "observed"),
    [
        (("fails", {"word": "x"}), "error: ValueError: no x"),
        (("multiply", {"a": 1}), "error: there is no tool 'multiply'; the tools are: add, fails"),
        (("add", {"a": 1}), "error: TypeError: add() missing 1 required positional argument: 'b'"),
        (("add", {"a": 1, "b": "x"}), "error: TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
    ],
)
def test_a_failing_or_unknown_tool_is_what_the_policy_observes(call, observed):
    outcome, asked = play(tools(add, fails), calls(call), says("done"))
    assert results(asked) == [observed]
    assert outcome.columns["failed_calls"] == 1


def test_a_long_result_is_cut_and_a_slow_async_tool_is_ended():
    async def slow(word: str) -> str:
        """Sleep.

        Args:
            word: The word.
        """
        await asyncio.sleep(30)

    def long(word: str) -> str:
        """Repeat.

        Args:
            word: The word.
        """
        return word * 30

    environment = tools(slow, long, tool_timeout=0.1, max_result=10)
    _, asked = play(environment, calls(("long", {"word": "x"}), ("slow", {"word": "x"})), says(""))
    assert results(asked) == ["xxxxxxxxxx ... (20 more characters)", "error: too ... (33 more characters)"]


@pytest.mark.parametrize(
    ("answers", "reward"),
    [
        ([says(" 3\n")], 1.0),
        ([says("4")], 0.0),
        ([says("3", "length")], 0.0),
        ([calls(("add", {"a": 1, "b": 2})), says("3")], 1.0),
        ([calls(("add", {"a": 1, "b": 2}))], 0.0),
        ([], 0.0),
    ],
)
def test_with_an_answer_the_last_turn_is_worth_1_if_it_is_right(answers, reward):
    """Turns or tokens that are used up are a wrong answer: no score would teach nothing of it."""
    environment = tools(add, answer="right")
    assert environment.columns() == {"right"}
    outcome, _ = play(environment, *answers, right=3)
    assert outcome.reward == reward


@pytest.mark.parametrize("times", [1, 2, 3])
def test_errors_of_the_infrastructure_are_retried_and_then_the_episode_has_no_score(times, monkeypatch):
    monkeypatch.setattr("hf_rlhf_plugins.environment.tools.WAIT_S", 0.0)
    tried = []

    async def fetch(word: str) -> str:
        """Fetch.

        Args:
            word: The word.
        """
        tried.append(word)
        if len(tried) <= times:
            raise ConnectionResetError("gone")
        return "there"

    if times == 3:
        with pytest.raises(RuntimeError, match="tool 'fetch': ConnectionResetError: gone"):
            play(tools(fetch), calls(("fetch", {"word": "x"})), says("done"))
    else:
        _, asked = play(tools(fetch), calls(("fetch", {"word": "x"})), says("done"))
        assert results(asked) == ["there"]
    assert len(tried) == min(times, 2) + 1


def test_errors_of_the_tool_are_not_retried():
    tried = []

    def broken(word: str) -> str:
        """Fail.

        Args:
            word: The word.
        """
        tried.append(word)
        raise KeyError(word)

    play(tools(broken), calls(("broken", {"word": "x"})), says("done"))
    assert tried == ["x"]


def test_the_reference_of_a_call_is_kept():
    call = calls(("add", {"a": 1, "b": 2}))
    call["tool_calls"][0]["id"] = "abc"
    _, asked = play(tools(add), call, says("3"))
    assert asked[1][2] == {"role": "tool", "name": "add", "content": "3", "tool_call_id": "abc"}


def bare(a, b):
    return a + b


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([bare], "tool 'bare' must have type hints and a docstring"),
        ([add, add], "tools must have different names, got add twice"),
        (["nowhere.py:f"], "cannot load nowhere.py"),
        (["f"], "tool must be file.py:name or package.module:name"),
    ],
)
def test_functions_that_cannot_be_tools_are_refused(given, words):
    (problem,) = load_plugin("environment", "tools", tools=given).check(SimpleNamespace())
    assert words in problem


@pytest.mark.parametrize(
    ("settings", "words"), [({}, "at least one function"), ({"tools": [add], "retries": -1}, "0 or more")]
)
def test_settings_are_checked(settings, words):
    with pytest.raises(RecipeError, match=words):
        load_plugin("environment", "tools", **settings)
