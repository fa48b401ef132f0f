"""Environments of `verifiers`, with the package itself: its interception server stands between its harness and the policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Model, Task
from hf_rlhf.batch import Prompt
from hf_rlhf.testing import conformance
from tests.helpers.environments import Played1, Says, opened, play, policy

pytestmark = pytest.mark.environments
sys.path.insert(0, str(Path(__file__).parent))


def letters(**settings: Any) -> Any:
    settings = {"settings": {"agent": {"runtime": {"type": "subprocess"}}}} | settings
    return load_plugin("environment", "verifiers", taskset="letters_taskset", **settings)


async def directly(task: Task, model: Model) -> float:
    """What the harness does."""
    messages: list[Any] = [{"role": "user", "content": f"say {'xyz'[task.columns['task']]}"}]
    messages += [await model(messages), {"role": "user", "content": "again"}]
    await model(messages)
    return 1.0


@pytest.mark.proves("environment.verifiers", how="parity", tolerance="0")
def test_a_harness_plays_and_its_task_scores() -> None:
    environment = letters()
    assert list(environment.check(None)) == []
    engine, columns = Says(texts=("no", "y")), {"task": [0, 1, 2]}
    with opened(environment):
        played = play(environment, engine, ["ab", "c", "de"], columns=columns)
    found = played.completions.columns
    assert found["episode/end"] == ["played"] * 3, played.reasons
    assert found["episode/reward"] == [0.0, 2.0, 0.0]
    assert found["episode/metrics/answers"] == [2.0] * 3
    direct = play(Played1(function=directly), Says(texts=("no", "y")), ["ab", "c", "de"], columns=columns)
    assert (played.completions.ids, played.completions.masks) == (direct.completions.ids, direct.completions.masks)
    assert played.completions.logps == direct.completions.logps
    assert played.prompt_ids == direct.prompt_ids
    assert policy().tokenizer.decode(played.prompt_ids[1]) == "say y"


def test_an_episode_without_turns_left_is_over_and_a_failing_one_has_no_score() -> None:
    environment = letters(max_turns=1)
    with opened(environment):
        over = play(environment, Says(), ["ab"], columns={"task": [0]})
        wrong = play(environment, Says(), ["ab"], columns={"task": [7]})
    assert over.completions.columns["episode/end"] == ["over"], over.reasons
    assert wrong.completions.columns["episode/end"] == ["error"]
    assert "column 'task' must be from 0 to 2, got 7" in wrong.reasons[0]


def test_it_conforms() -> None:
    prompts = [Prompt(ids=policy().tokenizer("ab")["input_ids"], prompt="ab", columns={"task": i}) for i in range(2)]
    with opened(letters()) as environment:
        for fact in conformance(environment, prompts=prompts):
            fact()


def test_what_cannot_be_loaded_is_refused() -> None:
    (problem,) = load_plugin("environment", "verifiers", taskset="nowhere").check(None)
    assert problem.startswith("taskset 'nowhere' ")
    (problem,) = letters(settings={"nothing": 1}).check(None)
    assert "nothing" in problem
