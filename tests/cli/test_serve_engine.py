"""`hf-rlhf serve-engine`: the command that starts the servers of a recipe's engine."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from hf_rlhf.cli.app import app
from hf_rlhf.cli.main import add_commands
from hf_rlhf.runtime.errors import UserError
from tests.helpers.paths import ROOT

WORKER = ROOT / "plugins" / "rollout" / "_vllm_worker"
NEEDED = ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
NEEDED += ["--worker-extension-cls", "hf_rlhf_vllm_worker.Worker"]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """The words of each line that the command prints."""
    add_commands()
    app(["serve-engine", "grpo", "--model", "some/model", *words], standalone_mode=False)
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_it_prints_the_command_with_every_flag_that_the_engine_checks(capsys):
    (words,) = said(capsys, "rollout.use=vllm", "rollout.max_new_tokens=64", "dataset.max_prompt_tokens=36")
    variables = dict(word.split("=", 1) for word in words[: words.index("python")])
    assert variables.pop("VLLM_SERVER_DEV_MODE") == "1"
    assert os.path.samefile(variables.pop("PYTHONPATH"), WORKER)
    assert not variables
    rest = words[words.index("python") + 1 :]
    assert rest[:4] == ["-m", "hf_rlhf_vllm_worker", "serve", "some/model"]
    flags = ["--host", "127.0.0.1", "--port", "8000", "--dtype", "float32", "--max-model-len", "100"]
    assert rest[4:] == [*flags, *NEEDED]


@pytest.mark.parametrize(
    ("override", "flags"),
    [
        ("training.bf16=true", ["--dtype", "bfloat16"]),
        ("model.dtype=bfloat16", ["--dtype", "bfloat16"]),
        ("rollout.url=http://10.0.0.7:8123", ["--host", "10.0.0.7", "--port", "8123"]),
        ("rollout.url=https://engine", ["--host", "engine", "--port", "443"]),
        ("model.tokenizer=other/words", ["--tokenizer", "other/words"]),
        ("model.revision=v2", ["--revision", "v2"]),
    ],
)
def test_settings_of_the_recipe_become_flags(capsys, override, flags):
    (words,) = said(capsys, "rollout.use=vllm", override)
    start = words.index(flags[0])
    assert words[start : start + len(flags)] == flags


def test_flags_of_its_own_come_last_and_each_url_has_a_server_whose_key_is_named_only(capsys, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    recipe = [
        "rollout.use=vllm",
        "rollout.url=[http://127.0.0.1:8001, http://127.0.0.1:8002]",
        "rollout.token_env=SOME_KEY",
    ]
    lines = said(capsys, *recipe, "--python", "../v/bin/python", "--enforce-eager", "--max-num-seqs", "4")
    assert [line[line.index("--port") + 1] for line in lines] == ["8001", "8002"]
    for line in lines:
        assert line[-3:] == ["--enforce-eager", "--max-num-seqs", "4"]
        assert "../v/bin/python" in line
        assert "VLLM_API_KEY=$SOME_KEY" in line
        assert "s3cret" not in " ".join(line)


def test_run_becomes_the_server_with_the_variables_of_the_command(capsys, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    monkeypatch.setenv("PYTHONPATH", "mine")
    ran = []
    monkeypatch.setattr(os, "execvpe", lambda *call: ran.append(call))
    said(capsys, "rollout.use=vllm", "rollout.token_env=SOME_KEY", "--run", "--python", "p", "--enforce-eager")
    ((file, words, environment),) = ran
    assert file == words[0] == "p"
    assert words[-1] == "--enforce-eager"
    assert environment["VLLM_API_KEY"] == "s3cret"
    worker, mine = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(worker).resolve(), mine) == (WORKER.resolve(), "mine")


def test_what_cannot_be_served_is_refused(capsys):
    with pytest.raises(UserError, match="rollout=generate has no server"):
        said(capsys)
    with pytest.raises(UserError, match="names 2 servers, and --run runs one"):
        said(capsys, "rollout.use=vllm", "rollout.url=[http://a:1, http://b:1]", "--run")
    with pytest.raises(UserError, match="--python /nowhere/python cannot be run: No such file"):
        said(capsys, "rollout.use=vllm", "--run", "--python", "/nowhere/python")
