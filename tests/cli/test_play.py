"""`hf-rlhf play`: somebody types what the policy would say, from a pipe and at a terminal, and sees masks and rewards."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.cli import main
from hf_rlhf.registry.host import Host, use_host
from hf_rlhf.testing import tiny_policy
from tests.helpers.chats import chat_tokenizer
from tests.helpers.paths import ROOT
from tests.helpers.terminals import terminal

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(1, 41)]
OWN = '''
import asyncio
from dataclasses import dataclass
from hf_rlhf import hookimpl
from hf_rlhf.axes import Environment, Outcome

@dataclass(kw_only=True)
class Odd(Environment):
    """Fails after an answer `no`, and otherwise asks until there are no turns left."""
    name = "odd"

    def play(self, task, model):
        messages = list(task.messages)
        while True:
            print("noise of an environment")
            said = model(messages)
            if said["content"] == "no":
                raise OSError("no such door")
            messages += [said, {"role": "user", "content": "?"}]

@dataclass(kw_only=True)
class Both(Environment):
    """Asks two agents the same at the same time."""
    name = "both"
    agents = ("ann", "bob")

    async def play(self, task, model):
        said = await asyncio.gather(*(model(task.messages, agent=agent) for agent in self.agents))
        return Outcome(reward={agent: float(one["content"]) for agent, one in zip(self.agents, said)})

@hookimpl
def environment():
    return [Odd, Both]
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_RLHF_TRACEBACK", "")
    for part in tiny_policy():
        part.save_pretrained("model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "odd.py").write_text(OWN)
    return tmp_path


@pytest.fixture
def play(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Plays a recipe with these lines on stdin; returns the exit code, and the lines on stdout and stderr."""

    def run(lines: list[str], *words: str) -> tuple[int, list[str], str]:
        named = ["--model", "model", "--dataset", "rows.jsonl", "training.use_cpu=true"]
        monkeypatch.setattr(sys, "argv", ["hf-rlhf", "play", *words, *named])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capfd.readouterr()
        with use_host(Host()), pytest.raises(SystemExit) as stopped:
            main.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out.splitlines(), err

    return run


def test_an_episode_shows_what_the_policy_reads_its_masks_and_its_rewards(play):
    code, out, _ = play(["12", "4"], "second_chance", "--row", "3")
    assert code == 0
    assert out == [
        "row 3 of 36, up to 4 tokens a turn, environment second_chance (2 turns, 24 tokens)",
        "3+1=",
        "> 12",
        "no 3+1=",
        "> 4",
        "",
        "the row in training",
        "  prompt     4 tokens | 3+1=",
        "  mask 1     3 tokens | 12<eos>",
        "  mask 0     7 tokens | no 3+1=",
        "  mask 1     2 tokens | 4<eos>",
        "ended with stop",
        "reward     0.5",
        "  episode: 0.5",
        "of its turns: 0, 0.5",
        "answer: 4",
        "episode/attempts: 2",
    ]


def test_a_row_without_an_environment_is_answered_once_and_scored_by_every_source(play):
    rewards = "rewards=[{use: exact_match, weight: 2.0}, {use: regex, pattern: '[0-9]', when: {answer: nothing}}]"
    code, out, _ = play(["2"], "quickstart", rewards)
    assert code == 0
    assert out[0].endswith("environment none")
    assert out[-4:] == ["reward     2", "  exact_match: 1, weight 2", "  regex: none", "answer: 2"]


def test_a_tool_is_called_and_its_result_has_mask_0(play):
    code, out, _ = play(["[calc(3 * 4)]", "12"], "calculator", "--held-out")
    assert code == 0
    start = out.index("the row in training")
    assert out[start + 2 : start + 7] == [
        "  mask 1    14 tokens | [calc(3 * 4)]<eos>",
        "  mask 0     4 tokens | ",
        "                      | 12",
        "                      | ",
        "  mask 1     3 tokens | 12<eos>",
    ]
    assert "episode/calls: 1" in out


def test_the_chat_templates_text_is_shown_and_a_line_end_can_be_typed(play):
    chat_tokenizer("chatml", special=("<|im_start|>", "<|im_end|>")).save_pretrained("model")
    bounds = ["rollout.max_new_tokens=8", "environment.0.max_tokens=90", "dataset.chat=true"]
    code, out, _ = play(["a\\nb", "2"], "second_chance", *bounds)
    assert code == 0
    asked = [line for line in out if line.startswith("<|im_start|>assistant")]
    assert len(asked) == 2
    row = out[out.index("the row in training") :]
    assert "  mask 1     4 tokens | a" in row
    assert "                      | b<|im_end|>" in row
    assert any(line.endswith("<|im_start|>user") for line in row)
    assert "reward     0.5" in row


def test_both_agents_of_a_game_are_played_and_each_has_a_row(play, place):
    (place / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "5:", "heap": "5", "opponent": "policy"}) for _ in ROWS)
    )
    code, out, _ = play(["1", "3", "1"], "self_play")
    assert code == 0
    assert out[1:10] == ["[first]", "5:", "> 1", "[second]", "4:", "> 3", "[first]", "1:", "> 1"]
    first, second = (out.index(f"the row in training of the agent {agent}") for agent in ("first", "second"))
    assert out[first + 1 : first + 7] == [
        "  prompt     2 tokens | 5:",
        "  mask 1     2 tokens | 1<eos>",
        "  mask 0     2 tokens | 1:",
        "  mask 1     2 tokens | 1<eos>",
        "ended with stop",
        "reward     1",
    ]
    assert out[second + 1 : second + 5] == [
        "  prompt     2 tokens | 4:",
        "  mask 1     2 tokens | 3<eos>",
        "ended with stop",
        "reward     0",
    ]


def test_agents_that_are_asked_at_the_same_time_are_played_one_after_the_other(play):
    code, out, err = play(["2", "3"], "second_chance", "environment=[{use: both, max_tokens: 24}]", "-p", "odd.py")
    assert code == 0, err
    assert out[1:7] == ["[ann]", "1+1=", "> 2", "[bob]", "1+1=", "> 3"]
    assert [line for line in out if line.startswith("reward ")] == ["reward     2", "reward     3"]


def test_episodes_follow_each_other_and_an_unfinished_one_ends_the_command(play):
    code, out, err = play(["2", "9"], "second_chance", "--episodes", "2")
    assert code == 2
    assert "reward     1" in out
    assert "the input ended in the middle of an episode. Give a line for each turn" in err


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a", "b"], ["ended with length: no turns or tokens were left", "reward     none"]),
        (["no"], ["ended with stop: raised OSError: no such door", "reward     none"]),
    ],
)
def test_an_episode_without_an_outcome_says_why_and_prints_of_environments_go_to_stderr(play, lines, words):
    own = ["environment=[{use: odd, max_turns: 2, max_tokens: 24}]", "-p", "odd.py"]
    code, out, err = play(lines, "second_chance", *own)
    assert code == 0
    for word in words:
        assert word in out
    assert "noise of an environment" in err
    assert "noise of an environment" not in out


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["second_chance", "--row", "41"], "--row must be up to 36, the last row that can be played, got 41"),
        (["second_chance", "--held-out", "dataset.held_out=0"], "no rows are held out of the dataset"),
        (["dpo"], "the recipe dpo trains on a dataset"),
        (
            ["second_chance", "environment.0.column=nothing"],
            "environment.second_chance reads nothing: the dataset has answer",
        ),
        (["second_chance", "environment.0.max_tokens=500"], "leaves no room for a prompt"),
    ],
)
def test_what_cannot_be_played_is_refused(play, given, problem):
    code, _, err = play([], *given)
    assert code == 2
    assert problem in err


@pytest.mark.skipif(shutil.which("tmux") is None and os.environ.get("CI") != "true", reason="tmux is not installed")
def test_an_episode_at_a_terminal(place):
    command = [sys.executable, "-m", "hf_rlhf", "play", "second_chance", "--model", "model", "--dataset", "rows.jsonl"]
    with terminal(["env", "-C", str(place), f"PYTHONPATH={ROOT}", *command], OMP_NUM_THREADS="1") as shown:
        shown.wait_for("\n>")
        shown.tmux("send-keys", "no", "BSpace", "BSpace", "7", "Enter")
        shown.wait_for("no 1+1=")
        shown.tmux("send-keys", "C-d")
        assert shown.end() == 2
        assert "> 7" in shown.screen()
        assert "the input ended in the middle of an episode" in shown.screen()
