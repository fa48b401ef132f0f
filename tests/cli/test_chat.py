"""`hf-rlhf chat`: transformers' chat on a terminal, with a model of this machine and without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.cli import main
from hf_rlhf.cli.chat_server import Answering
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import load_model, load_tokenizer
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs
from tests.helpers.paths import ROOT
from tests.helpers.runs import save_classifier
from tests.helpers.waits import until

TMUX = shutil.which("tmux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter, whose tokenizer has a chat template and whose recipe samples greedily."""
    place = tmp_path_factory.mktemp("chat")
    model, tokenizer = tiny_policy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    rollout = {**runs.SAMPLED, "max_new_tokens": 12, "temperature": 1.0}
    settings = {"path": str(place / "base"), "lora": {"r": 4}}
    made = runs.trainer(
        place / "run", rollout=rollout, model=settings, data=[{"prompt": "abc", "answer": "d"}] * 20, policy=None
    )
    made.train()
    made.save_model()
    made.close()
    return place / "run"


def greedy(folder: Path, messages: list[dict[str, str]], tokens: int = 12) -> str:
    """What the model with its adapter says, by its forward alone."""
    tokenizer = load_tokenizer(Model(path=str(folder)))
    model: Any = load_model(Model(path=str(folder)))
    ids = Answering(model, tokenizer).prompt(messages)
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


class Tmux:
    """A terminal of its own."""

    def __init__(self, command: list[str], place: Path):
        self.base = [str(TMUX), "-L", f"chat-{os.getpid()}", "-f", "/dev/null"]
        env = [
            word
            for name in ("HF_HOME", "HOME", "PYTHONPATH")
            if (x := os.environ.get(name))
            for word in ("-e", f"{name}={x}")
        ]
        self("new-session", "-d", "-x", "100", "-y", "40", "-c", str(place), *env, *command)

    def __call__(self, *words: str) -> str:
        return subprocess.run([*self.base, *words], check=True, capture_output=True, text=True).stdout

    def screen(self) -> str:
        return self("capture-pane", "-p", "-S", "-200")

    def type(self, text: str) -> None:
        self("send-keys", "-l", text)
        self("send-keys", "Enter")


def letters(text: str) -> str:
    """A text without what Markdown, boxes and line breaks add."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


@pytest.mark.skipif(TMUX is None and os.environ.get("CI") != "true", reason="tmux is not installed")
def test_a_conversation_on_a_terminal(folder, tmp_path):
    """Asked twice, the second time after the first answer; the Hub is forbidden."""
    command = [sys.executable, "-m", "hf_rlhf", "chat", str(folder), "do_sample=false", "--save-folder", "saved"]
    terminal = Tmux(["env", "HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1", f"PYTHONPATH={ROOT}", *command], tmp_path)
    try:
        until(lambda: "was already loaded" in terminal.screen(), 120, what="no chat")
        messages = []
        for question in ("hello there", "and now"):
            messages.append({"role": "user", "content": question})
            answer = greedy(folder, messages)
            messages.append({"role": "assistant", "content": answer})
            before = terminal.screen().count("tokens in")
            terminal.type(question)
            until(lambda count=before: terminal.screen().count("tokens in") > count, 60, what="no answer")
            assert letters(answer) in letters(terminal.screen().rpartition("<run>:")[2])
            if "Continue generating" in terminal.screen():
                terminal.type("n")
        terminal.type("!status")
        until(lambda: '"max_new_tokens": 12' in terminal.screen(), 30, what="no status")
        terminal.type("!save")
        until(lambda: "Chat saved" in terminal.screen(), 30, what="nothing is saved")
        (saved,) = (tmp_path / "saved").rglob("*.json")
        assert json.loads(saved.read_text())["chat_history"][:1] == messages[:1]
        terminal.type("!exit")
        until(lambda: not alive(terminal), 30, what="the chat does not end")
    finally:
        subprocess.run([*terminal.base, "kill-server"], capture_output=True)


def alive(terminal: Tmux) -> bool:
    return subprocess.run([*terminal.base, "has-session"], capture_output=True).returncode == 0


# What is answered


def answering(folder: Path, template: bool = True) -> Answering:
    model, tokenizer = load_model(Model(path=str(folder))), load_tokenizer(Model(path=str(folder)))
    tokenizer.chat_template = tokenizer.chat_template if template else None
    return Answering(model, tokenizer)


USER = [{"role": "user", "content": "hello"}]


def test_a_conversation_is_rendered_as_in_training(folder):
    made = answering(folder)
    assert made.tokenizer.decode(made.prompt(USER)) == "user: hello\nassistant: "
    assert made.tokenizer.decode(answering(folder, template=False).prompt(USER)) == "hello"


def test_sampling_follows_the_settings(folder):
    made = answering(folder)
    greedily = "".join(text for text, *_ in made.answer(USER, {"do_sample": False, "max_new_tokens": 8}))
    assert greedily == greedy(folder, USER, 8)
    torch.manual_seed(0)
    hot = {"do_sample": True, "temperature": 2, "top_k": 0, "max_new_tokens": 8}
    assert len({"".join(text for text, *_ in made.answer(USER, hot)) for _ in range(5)}) > 1
    *_, (_, reason, count) = made.answer(USER, {"do_sample": False, "max_new_tokens": 2})
    assert (reason, count) == ("length", 2)


def test_what_fails_is_said_and_the_conversation_goes_on(folder):
    made = answering(folder)
    long = [{"role": "user", "content": "x" * 5000}]
    (said,) = made.answer(long, {})
    assert "the model's context" in said[0]
    made.model.generate = None
    assert "TypeError" in "".join(text for text, *_ in made.answer(USER, {}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{folder}", "temprature=0.2"], "Did you mean 'temperature'"),
        (["{folder}", "temperature"], "must be KEY=VALUE"),
        (["nowhere"], "no model folder nowhere"),
        (["{classifier}"], "writes nothing"),
    ],
)
def test_what_cannot_chat_is_refused(folder, tmp_path, monkeypatch, capsys, words, said):
    names = {"folder": folder, "classifier": save_classifier(tmp_path / "classifier")}
    monkeypatch.setattr(sys, "argv", ["hf-rlhf", "chat", *(word.format(**names) for word in words)])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
