"""Manners of the command line: help with examples that run, JSON alone on stdout, exit codes, what wins over what, errors
without tracebacks, `hf-rlhf env`."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from hf_rlhf import __version__
from hf_rlhf.cli import app, main
from hf_rlhf.cli.commands.evaluate import overrides_of, split_models
from hf_rlhf.cli.output import examples_of
from hf_rlhf.config.pipeline import load_pipeline
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.registry.host import Host, use_host
from tests.helpers.waits import scaled

BAD = '''
from dataclasses import dataclass
from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource

@dataclass(kw_only=True)
class Bad(RewardSource):
    """Raises."""
    name = "bad"

    def columns(self):
        raise ZeroDivisionError("by design")

    def __call__(self, rollouts):
        return [0.0 for _ in rollouts.completions]

@hookimpl
def rewards():
    return [Bad]
'''
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""
FAULT = ("score", "bad", "-p", "bad.py", "--dataset", "solutions.jsonl")


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `hf-rlhf WORDS` in this process."""

    def run(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["hf-rlhf", *words])
        capfd.readouterr()
        with use_host(Host()), pytest.raises(SystemExit) as stopped:
            main.main()
        return Said(int(stopped.value.code or 0), *capfd.readouterr())

    monkeypatch.setenv("HF_RLHF_TRACEBACK", "")  # what a command sets is put back
    return run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the examples name, and a cache that is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {"prompt": f"{i}+1=", "answer": f"#### {i + 1}", "completion": f"#### {i}", "solution": f"#### {i}"}
        for i in range(100)
    ]
    write(tmp_path / "problems.jsonl", rows)
    write(tmp_path / "solutions.jsonl", [{**row, "is_correct": False} for row in rows[:4]])
    import pandas

    pandas.DataFrame(rows[:4]).to_parquet(tmp_path / "solutions.parquet")
    (tmp_path / "mine.yaml").write_text(load_recipe("grpo").dump())
    for name, recipe in {"quickstart": "quickstart", "grpo": "grpo", "rloo": "rloo", "a": "grpo", "b": "rloo"}.items():
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "recipe.yaml").write_text(load_recipe(recipe).dump())
        times = '"time/rollout_s": 0.2, "time/update_s": 0.1, "rollout/length/mean": 4.0'
        (tmp_path / "outputs" / name / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 0.0, {times}}}\n')
    (tmp_path / "rewards.py").write_text(
        "def brevity(completions, **_):\n    return [1.0 / len(c) for c in completions]\n"
    )
    (tmp_path / "bad.py").write_text(BAD)
    for name in ("config.yaml", "grpo_config.json"):
        (tmp_path / name).write_text('{"scale_rewards": "group"}')
    return tmp_path


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("\n".join(map(json.dumps, rows)))


def commands() -> dict[str, Any]:
    """Every command with its whole name."""

    def walk(title: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield title, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(f"{title} {name}", inner)

    main.add_commands()
    return dict(walk("hf-rlhf", typer.main.get_command(app.app)))


COMMANDS = commands()
EXAMPLES = [line for command in COMMANDS.values() for line in examples_of(command)]
PARSED_ALONE = ("serve-reward", "serve-engine", "pipeline", "dashboard", "evaluate", "chat", "play")
"""Commands that run long: their examples are parsed, and what they name is looked at where that is cheap."""


# Help


@pytest.mark.parametrize("title", COMMANDS)
def test_every_command_has_help_with_examples_of_itself(title, run):
    said = run(*title.split()[1:], "--help")
    assert said.code == 0
    assert not said.err
    for option in COMMANDS[title].params:
        if option.param_type_name == "option":
            assert option.opts[0] in said.out
            assert (getattr(option, "help", None) or "").strip(), f"{title} {option.opts[0]} says nothing"
    own = examples_of(COMMANDS[title])
    assert own, f"{title} has no examples: give its decorator epilog=examples(...)"
    assert any(line.startswith(title) for line in own)
    assert all(line in said.out for line in own)
    assert said.out == run(*title.split()[1:], "-h").out


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_of_help_runs(line, run, place):
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word in ("hf-rlhf", "hf_rlhf"))
    words = words[start + 1 : words.index(">")] if ">" in words else words[start + 1 :]
    while words[0] == "-p":
        words = words[2:]
    alone = words[0] in PARSED_ALONE or "--all" in words or words[:2] == ["plugins", "check"]
    if words[0] == "train" or alone:
        parsed(words)
    if words[0] == "evaluate":
        _, others = split_models([word for word in words[1:] if not word.startswith("outputs/")])
        load_recipe("grpo", overrides_of([word for word in others if "=" in word], None, None, None))
    if words[0] == "pipeline":
        load_pipeline(words[1], [word for word in words if "=" in word])
    if words[0] == "serve-reward":
        words = ["score", *words[1:2], *(w for w in words[2:] if "=" in w), "--dataset", "solutions.jsonl"]
    elif words[0] == "train":
        words = [word for word in ["check", *words[1:]] if word not in ("--resume", "--output-dir", "outputs/grpo")]
    elif alone:
        return
    said = run(*words)
    assert said.code == 0, said.out + said.err


def parsed(words: list[str]) -> None:
    """Raises where the command line itself does not take these words."""
    depth = 2 if f"hf-rlhf {' '.join(words[:2])}" in COMMANDS else 1
    command = COMMANDS[f"hf-rlhf {' '.join(words[:depth])}"]
    with use_host(Host()):
        command.make_context(words[depth - 1], list(words[depth:]))


# JSON


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        (["plugins"], lambda x: {"axis", "name", "package", "version", "problem"} == set(x[0])),
        (["recipes"], lambda x: "grpo" in [recipe["name"] for recipe in x]),
        (["recipes", "show", "grpo"], lambda x: x["advantages"] == {"use": "group_norm"}),
        (["show", "advantages"], lambda x: "gae" in x["names"] and "@hookimpl" in x["example"]),
        (["show", "advantages", "gae"], lambda x: "lam" in [setting["name"] for setting in x["settings"]]),
        (["show", "kl", "in_loss"], lambda x: x["name"] == "in_loss" and x["needs"]),
        (["check", "grpo"], lambda x: x["recipe"] == "grpo" and ["processes", "1"] in [r[:2] for r in x["arithmetic"]]),
        (["check", "instructgpt"], lambda x: list(x["stages"]) == ["sft", "rm", "ppo"]),
        (["explain", "grpo"], lambda x: len(x["recipes"][0]["rows"]) == 8 and "loss" in x["recipes"][0]["terms"]),
        (["explain", "grpo", "rloo"], lambda x: "advantages" in [row["setting"] for row in x["differences"]]),
        (["lab", "rloo", "--group", "2"], lambda x: len(x) > 1),
        (["score", "rewards.py:brevity", "--dataset", "solutions.jsonl"], lambda x: len(x["scores"]["brevity"]) == 4),
        (["env"], lambda x: x["hf_rlhf"] == __version__ and x["plugins"]["hf_rlhf"]["plugins"] > 50),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_json_is_alone_on_stdout(words, holds, run, place):
    said = run(*words, "--json")
    assert said.code == 0, said.err
    assert holds(json.loads(said.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON")))


def test_what_a_plugin_prints_does_not_mix_with_json(run, place):
    (place / "loud.py").write_text(BAD.replace("from dataclasses", "print('loud')\nfrom dataclasses", 1))
    said = run("plugins", "--json", "-p", "loud.py")
    assert "bad" in [plugin["name"] for plugin in json.loads(said.out)]
    assert "loud" in said.err


# Exit codes and errors


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["check", "nope"], 2),
        (["check", "grpo", "--no_such_flag", "1"], 2),
        (["lab", "--seed", "x"], 2),
        (["no-such-command"], 2),
        (["score", "rewards.py:brevity", "--dataset", "solutions.jsonl"], 0),
        (["score", "rewards.py:fails", "--dataset", "solutions.jsonl"], 1),
        (list(FAULT), 1),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_exit_code_says_what_happened(words, code, run, place):
    with open("rewards.py", "a") as file:
        file.write("def fails(completions, **_):\n    raise ValueError('not today')\n")
    said = run(*words)
    assert said.code == code, said.err
    assert code in dict(app.EXIT_CODES)
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_own_code_and_no_traceback(number, code, tmp_path):
    """In the middle of a command: it runs a plugin file that sleeps."""
    (tmp_path / "slow.py").write_text(SLOW)
    words = [sys.executable, "-m", "hf_rlhf", "plugins", "-p", "slow.py"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=scaled(60))
    assert (process.returncode if process.returncode >= 0 else 128 - process.returncode) == code
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error():
    words = [sys.executable, "-m", "hf_rlhf", "recipes", "show", "grpo"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=scaled(60))
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_error_that_nobody_foresaw_names_the_plugin_and_the_file_with_the_traceback(run, place):
    said = run(*FAULT)
    lines = said.err.splitlines()
    assert lines[0] == "error: ZeroDivisionError: by design"
    assert f"{place / 'bad.py'}, line 12, columns: rewards.bad of file bad.py" in lines[1]
    assert "hf-rlhf env" in lines[-1]
    file = Path(re.findall(r"traceback: (\S+)", said.err)[0])
    assert file.is_relative_to(place / "cache")
    assert file.read_text().rstrip().endswith("ZeroDivisionError: by design")
    assert len(lines) == 4


@pytest.mark.parametrize("asked", [(*FAULT, "--traceback"), ("--traceback", *FAULT), ("check", "nope", "--traceback")])
def test_a_traceback_is_printed_where_it_is_asked_for(asked, run, place):
    said = run(*asked)
    assert "Traceback (most recent call last)" in said.err
    assert (
        said.err.rstrip().splitlines()[-1].startswith(("ZeroDivisionError", "hf_rlhf.registry.discovery.PluginError"))
    )
    assert said.code == (2 if "nope" in asked else 1)


def test_the_flag_wins_over_the_variable_and_the_variable_does_the_same(run, place, monkeypatch):
    monkeypatch.setenv("HF_RLHF_TRACEBACK", "0")
    assert "Traceback" not in run(*FAULT).err
    assert "Traceback" in run("--traceback", *FAULT).err
    monkeypatch.setenv("HF_RLHF_TRACEBACK", "1")
    assert "Traceback" in run(*FAULT).err


def test_a_traceback_that_cannot_be_written_is_printed(run, place, monkeypatch):
    (place / "file").write_text("")
    monkeypatch.setenv("HF_RLHF_CACHE", str(place / "file"))
    assert "Traceback" in run(*FAULT).err


def test_one_file_holds_the_last_traceback(run, place):
    run(*FAULT)
    run(*FAULT)
    assert [file.name for file in (place / "cache").glob("*.txt")] == ["last_traceback.txt"]


# What wins


@pytest.mark.parametrize(
    ("words", "temperature"),
    [
        ([], 1.0),
        (["rollout.temperature=0.5"], 0.5),
        (["rollout.temperature=0.5", "rollout.temperature=0.6"], 0.6),
        (["--temperature", "0.7"], 0.7),
        (["--temperature", "0.7", "rollout.temperature=0.5"], 0.7),
        (["rollout.temperature=0.5", "--temperature", "0.7"], 0.7),
        (["--temperature", "0.7", "--temperature", "0.8"], 0.8),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_flags_win_over_overrides_and_these_over_the_recipe(words, temperature, run):
    plan = json.loads(run("check", "grpo", "--json", *words).out)
    assert plan
    from hf_rlhf.cli.commands.train import read

    assert read("grpo", None, words, None, None, None, None).algorithm().rollout.temperature == temperature


@pytest.mark.parametrize(
    ("named", "override", "flag", "name"),
    [
        (None, [], [], "mine"),
        ("environment", [], [], "environment"),
        ("environment", ["training.run_name=override"], [], "override"),
        ("environment", ["training.run_name=override"], ["--run_name", "flag"], "flag"),
    ],
)
def test_the_environment_wins_over_the_default_and_loses_to_recipe_override_and_flag(
    named, override, flag, name, monkeypatch, place
):
    from hf_rlhf.cli.commands.train import read

    monkeypatch.delenv("WANDB_NAME", raising=False)
    if named:
        monkeypatch.setenv("WANDB_NAME", named)

    def chosen(recipe: str) -> str:
        return read(recipe, None, [*flag, *override], None, None, None, None).training_keywords("out")["run_name"]

    assert chosen("mine.yaml") == name
    written = load_recipe("grpo", ["training.run_name=recipe"]).dump()
    (place / "named.yaml").write_text(written)
    assert chosen("named.yaml") == (name if override else "recipe")


def test_options_win_over_overrides_and_flags_of_the_same_key():
    from hf_rlhf.cli.commands.train import read

    words = ["--learning_rate", "0.5", "training.seed=1", "model.path=override", "training.max_steps=1"]
    recipe = read("grpo", None, words, "option", None, 2, 3)
    assert (recipe.model.path, recipe.training["seed"], recipe.training["max_steps"]) == ("option", 2, 3)


def test_a_stage_is_named_after_the_environment(monkeypatch):

    recipe = load_recipe("grpo")
    recipe.name = "instructgpt/ppo"
    monkeypatch.setenv("WANDB_NAME", "tuesday")
    assert recipe.training_keywords("out")["run_name"] == "tuesday/ppo"


def test_the_variable_turns_off_and_the_option_adds_to_it(run, place, monkeypatch):
    monkeypatch.setenv("HF_RLHF_DISABLE_PLUGINS", "rewards.judge,rewards.bad")
    listed = json.loads(run("plugins", "--json", "-p", "no:rewards.length", "-p", "bad.py").out)
    off = {plugin["name"] for plugin in listed if plugin["problem"] and plugin["axis"] == "rewards"}
    assert off == {"judge", "length"}
