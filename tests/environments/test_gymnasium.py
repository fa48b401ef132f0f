"""The example package for Gymnasium, with Gymnasium itself."""

from __future__ import annotations

import sys

import pytest

from hf_rlhf.axes import Environment
from hf_rlhf.testing import conformance
from tests.helpers.environments import Says, opened, play
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.environments
sys.path.insert(0, str(ROOT / "examples" / "environments" / "hf-rlhf-gymnasium"))
LAKE = {"id": "FrozenLake-v1", "actions": ["left", "down", "right", "up"], "options": {"is_slippery": False}}


def lake(**settings: object) -> Environment:
    from hf_rlhf_gymnasium import Gymnasium

    return Gymnasium(**{**LAKE, **settings})


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_each_turn_is_a_step_with_its_reward_and_state(workers: str) -> None:
    """The way over the ice that is known to be safe: down, down, right, right, down, right."""
    says = Says(texts=("down", "fly", "Down", "right", "right", "down", "right"))
    environment = lake(max_turns=9, wrong=-0.5, workers=workers, num_workers=2)
    assert list(environment.check(None)) == []
    with opened(environment):
        played = play(environment, says, ["go: "], group=2)
    found = played.completions.columns
    assert found["episode/turn_rewards"] == [[0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 1.0]] * 2, played.reasons
    assert found["episode/solved"] == [True] * 2
    said = [message["content"] for message in played.messages[0]]
    assert said[0] == "go: 0\n"
    assert said[2::2] == ["4\n", "4\n", "8\n", "9\n", "10\n", "14\n"]


def test_a_drawing_is_what_the_policy_reads_and_turns_that_are_used_up_end_it() -> None:
    environment = lake(max_turns=2, options={"is_slippery": False, "render_mode": "ansi"})
    with opened(environment):
        played = play(environment, Says(texts=("left",)), ["go:\n"])
    assert "FFFH" in played.messages[0][0]["content"]
    assert played.completions.columns["episode/turn_rewards"] == [[0.0, 0.0]]
    assert played.completions.columns["episode/solved"] == [False]


def test_wrong_actions_are_refused() -> None:
    (problem,) = lake(actions=["left"]).check(None)
    assert problem == "actions must name the 4 actions of FrozenLake-v1, got 1"


@pytest.mark.parametrize("fact", conformance(lake(max_turns=5)), ids=str)
def test_conforms(fact) -> None:
    fact()
