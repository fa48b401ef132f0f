"""`hf-rlhf env`: what a bug report needs, and nothing that a bug report must not hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from hf_rlhf.cli import main
from hf_rlhf.cli.commands.env import environment
from hf_rlhf.registry.host import Host, use_host

Env = Callable[..., str]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "WANDB_BASE_URL": "https://ann:sesame@wandb.example.org",
    "HF_ENDPOINT": "https://bob:pumpkin@hub.example.org/x",
    "WANDB_IDENTITY_TOKEN_FILE": "/home/ann/identity",
    "WANDB_HTTP_PROXY": "ann:secretpw@proxy:8080",
    "HF_PROXIES": "http://ann:juniper@one:1,https://bob:walrus/nutmeg@two:2",
}


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Env:
    """What `hf-rlhf env WORDS` prints to stdout."""

    def env(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hf-rlhf", "env", *words])
        capfd.readouterr()
        with use_host(Host()), pytest.raises(SystemExit) as stopped:
            main.main()
        assert not stopped.value.code
        return capfd.readouterr().out

    return env


def install(folder: Path, module: str) -> None:
    """A package with a plugin that cannot be imported, and an entry point that is wrong."""
    about = folder / "broken_pack-0.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-pack\nVersion: 0.3\n")
    (about / "entry_points.txt").write_text(f"[hf_rlhf]\nrewards.torn = {module}\nreward.near = {module}\n")
    (folder / f"{module}.py").write_text("raise RuntimeError('torn apart')\n")


def test_it_says_versions_devices_and_plugins(env):
    text = env()
    for name in ("torch", "transformers", "trl", "pluggy"):
        assert f"  {name}: {metadata.version(name)}\n" in text
    assert f"{torch.__version__} (" in text
    assert "devices:" in text
    assert "  bubblewrap: " in text
    assert "plugin faults: none" in text
    assert "\x1b" not in text
    assert text.isprintable() or text.replace("\n", "").isprintable()


def test_no_secret_is_in_it(env, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for text in (env(), env("--json")):
        whole = ("WANDB_API_KEY", "HF_TOKEN", "WANDB_IDENTITY_TOKEN_FILE")
        parts = ("sesame", "pumpkin", "secretpw", "juniper", "walrus", "nutmeg", "ann:", "bob:")
        for secret in (*(SECRETS[name] for name in whole), *parts):
            assert secret not in text
    listed = json.loads(env("--json"))["environment variables"]
    assert listed["HF_TOKEN"] == listed["WANDB_API_KEY"] == "(set)"
    assert listed["HF_ENDPOINT"] == "https://...@hub.example.org/x"
    assert listed["WANDB_HTTP_PROXY"] == "...@proxy:8080"
    assert listed["HF_PROXIES"] == "http://...@one:1,https://...@two:2"


def test_names_are_secret_by_whole_words(env, monkeypatch):
    shown = {"TOKENIZERS_PARALLELISM": "false", "HF_KEYNOTE": "a", "WANDB_AUTHOR": "ann", "HF_EMPTY": ""}
    hidden = ("HF_KEY", "WANDB_APIKEY", "HF_PASSWORD_FILE", "HF_AUTH", "HF_CREDENTIALS", "HF_SECRET_A", "HF_TOKENS")
    for name, value in {**shown, **dict.fromkeys(hidden, "x1")}.items():
        monkeypatch.setenv(name, value)
    listed = json.loads(env("--json"))["environment variables"]
    assert {name: listed[name] for name in (*shown, *hidden)} == {**shown, **dict.fromkeys(hidden, "(set)")}


def test_it_says_whether_there_is_an_account_which_mode_and_which_server(env, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert json.loads(env("--json"))["wandb"] == {
        "logged in": False,
        "mode": "offline",
        "server": "https://wandb.example.org",
    }
    (tmp_path / "none").write_text("machine wandb.example.org login user password " + "0" * 40)
    assert json.loads(env("--json"))["wandb"]["logged in"] is True


def test_plugins_that_cannot_be_used_are_named_and_imported_only_where_asked(env, monkeypatch, tmp_path):
    install(tmp_path, "torn_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = json.loads(env("--json"))
    assert said["plugins"]["broken-pack"] == {"version": "0.3", "plugins": 2, "recipes": 0}
    assert said["plugin faults"] == [
        "reward.near of broken-pack 0.3: unknown axis 'reward'. Did you mean 'rewards'?",
    ]
    assert "torn_module" not in sys.modules
    text = env("--import")
    assert "rewards.torn of broken-pack 0.3" in text
    assert "torn apart" in text
    assert "hf_rlhf 0.1.0:" not in text.partition("plugin faults")[2]


def test_what_is_turned_off_is_a_fault_that_names_the_variable(env, monkeypatch):
    monkeypatch.setenv("HF_RLHF_DISABLE_PLUGINS", "rewards.judge")
    said = json.loads(env("--json"))
    assert said["plugin faults"] == [
        "rewards.judge of hf_rlhf 0.1.0: turned off by HF_RLHF_DISABLE_PLUGINS=rewards.judge"
    ]
    assert said["environment variables"]["HF_RLHF_DISABLE_PLUGINS"] == "rewards.judge"


def test_processes_of_a_launcher_are_told(env, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert json.loads(env("--json"))["distributed"] == "process ? of 2"


def test_an_installation_without_a_working_torch_still_reports(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    found = environment(Host(disable=""))
    assert found["torch"].startswith("cannot be imported: ModuleNotFoundError")
    assert "ModuleNotFoundError" in found["wandb"]["problem"]
    assert found["packages"]["transformers"]
