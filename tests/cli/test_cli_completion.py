"""Completion in the shell, asked as shells ask: by environment variables, and in bash by the script that Typer installs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_rlhf.cli import completion
from hf_rlhf.registry.host import Host
from hf_rlhf.registry.settings_schema import settings_of
from tests.helpers.waits import scaled

HERE = ["-c", "import sys; from hf_rlhf.cli.main import main; sys.argv[0] = 'hf-rlhf'; main()"]


def ask(place: Path, **environment: str) -> list[str]:
    """The lines that the program answers a shell with."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *HERE], cwd=place, env=env, capture_output=True, text=True, timeout=scaled(60)
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def bash(line: str, place: Path) -> list[str]:
    """What bash gets for a line whose last word is completed. It takes words apart at `=`."""
    words = line.replace("=", " = ").split() + [""] * line.endswith((" ",))
    return ask(place, COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1), _HF_RLHF_COMPLETE="complete_bash")


def fish(line: str, place: Path) -> list[str]:
    """What fish gets: whole words."""
    how = {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_HF_RLHF_COMPLETE": "complete_fish"}
    return [found.partition("\t")[0] for found in ask(place, _TYPER_COMPLETE_ARGS=line, **how)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and a plugin that may not be run."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "mine.yaml").write_text("rewards: [{use: length}]\nadvantages: {use: gae}\n")
    (folder / "notes.txt").write_text("")
    (folder / "runs").mkdir()
    (folder / "runs" / "recipe.yaml").write_text("")
    (folder / "plugin.py").write_text("raise SystemExit('it ran')")
    return folder


@pytest.mark.parametrize(
    ("line", "holds", "lacks"),
    [
        ("hf-rlhf expl", ["explain"], ["train"]),
        ("hf-rlhf train gr", ["grpo", "grpo@verl"], ["ppo", "mine.yaml"]),
        ("hf-rlhf train hf_rlhf/gr", ["hf_rlhf/grpo"], []),
        ("hf-rlhf pipeline ", ["instructgpt"], ["grpo"]),
        ("hf-rlhf pipeline instructgpt pp", ["ppo.recipe=", "ppo.advantages."], ["rm.recipe="]),
        ("hf-rlhf pipeline instructgpt ppo.advantages.use=g", ["ppo.advantages.use=gae"], []),
        ("hf-rlhf pipeline instructgpt ppo.recipe=gr", ["ppo.recipe=grpo"], []),
        ("hf-rlhf show adv", ["advantages"], ["rewards"]),
        ("hf-rlhf show advantages le", ["leave_one_out"], ["gae"]),
        ("hf-rlhf explain grpo rl", ["rloo"], ["grpo"]),
        ("hf-rlhf train grpo adv", ["advantages.use=gae", "advantages.use=leave_one_out"], ["grpo"]),
        ("hf-rlhf train grpo advantages.use=le", ["advantages.use=leave_one_out"], ["advantages.use=gae"]),
        ("hf-rlhf check grpo advantages.ep", ["advantages.eps=", "advantages.eps=0.0001"], []),
        ("hf-rlhf check mine.yaml advantages.", ["advantages.lam="], ["advantages.eps="]),
        ("hf-rlhf check grpo advantages.use=gae advantages.l", ["advantages.lam="], []),
        ("hf-rlhf train --config grpo advantages.use=le", ["advantages.use=leave_one_out"], []),
        ("hf-rlhf train grpo kl.", ["kl.0.", "kl.1."], ["kl.2."]),
        ("hf-rlhf train grpo kl.0.", ["kl.0.use=in_reward", "kl.0.beta=", "kl.0.estimator."], []),
        ("hf-rlhf train grpo kl.0.estimator.use=", ["kl.0.estimator.use=k3"], ["kl.0.estimator.use=in_loss"]),
        ("hf-rlhf train grpo model.dt", ["model.dtype="], []),
        ("hf-rlhf train grpo model.dtype=b", ["model.dtype=bfloat16"], ["model.dtype=float32"]),
        ("hf-rlhf train grpo dataset.shuffle=", ["dataset.shuffle=true", "dataset.shuffle=false"], []),
        ("hf-rlhf train grpo training.learn", ["training.learning_rate="], []),
        ("hf-rlhf train grpo --learn", ["--learning_rate"], []),
        ("hf-rlhf train grpo --num_gen", ["--num_generations"], []),
        ("hf-rlhf train grpo --out", ["--output-dir", "--output_dir"], []),
        ("hf-rlhf plugins -p no:rewards.j", ["no:rewards.judge", "no:rewards.json_schema"], []),
        ("hf-rlhf score ex", ["exact_match"], []),
        ("hf-rlhf score exact_match col", ["column="], []),
        ("hf-rlhf lab advantages.use=l", ["advantages.use=leave_one_out"], ["grpo"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_tab_offers_what_fits(line, holds, lacks, place, monkeypatch):
    """In this process, through the same entry as a shell's."""
    found = here(line, place, monkeypatch)
    assert set(holds) <= set(found)
    assert not set(lacks) & set(found)
    assert len(found) == len(set(found))
    assert all(word.startswith(line.rpartition(" ")[2]) for word in found)


@pytest.mark.parametrize("line", ["hf-rlhf train mi", "hf-rlhf train runs/", "hf-rlhf plugins -p plu"])
def test_where_nothing_fits_the_shell_offers_files(line, place, monkeypatch):
    assert here(line, place, monkeypatch) == []


def here(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What fish gets, without a process of its own."""
    import contextlib
    import io

    from hf_rlhf.cli import app, main
    from hf_rlhf.registry.host import use_host

    main.add_commands()
    monkeypatch.chdir(place)
    asked = {
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_HF_RLHF_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_ARGS": line,
    }
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit), use_host(Host(disable="")):
        completion.run(app.app)
    return [found.partition("\t")[0] for found in said.getvalue().splitlines() if found]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("hf-rlhf train grpo advantages.use=leave", ["leave_one_out"]),
        ("hf-rlhf train grpo model.dtype=bf", ["bfloat16"]),
        ("hf-rlhf train grpo kl.0.use=in_loss advantages.use=leave", ["leave_one_out"]),
        ("hf-rlhf train rlo", ["rloo", "rloo@openrlhf", "rloo@trl", "rloo@verl"]),
    ],
)
def test_bash_gets_what_stands_behind_the_equals_sign(line, found, place):
    assert bash(line, place) == found


def test_fish_and_zsh_get_whole_words(place):
    line = "hf-rlhf train grpo advantages.use=leave"
    assert fish(line, place) == ["advantages.use=leave_one_out"]
    (said,) = ask(place, _TYPER_COMPLETE_ARGS=line, _HF_RLHF_COMPLETE="complete_zsh")
    assert '"advantages.use=leave_one_out"' in said


def test_no_plugin_is_run_and_torch_is_not_imported(place):
    code = HERE[1].replace(
        "main()", "sys.addaudithook(lambda event, args: seen.append(args[0]) if event == 'import' else None); "
    )
    code = "seen = []; " + code + "import atexit; atexit.register(lambda: print(sorted({'torch', 'transformers', "
    code += "'hf_rlhf_plugins.advantages.gae'} & set(seen)), file=sys.stderr)); main()"
    line = "hf-rlhf train grpo -p plugin.py advantages.use=gae advantages.l"
    asked = {
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_HF_RLHF_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_ARGS": line,
    }
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env={**os.environ, **asked}, capture_output=True, text=True
    )
    assert {"advantages.lam=", "advantages.lam=0.95"} <= set(done.stdout.split())
    assert done.stderr.strip() == "[]"
    assert time.perf_counter() - begun < scaled(10)  # a tenth of a second of work, on a machine that may be busy


def test_bash_completes_with_the_script_that_is_installed(place):
    program = place / "bin" / "hf-rlhf"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!{sys.executable}\nfrom hf_rlhf.cli.main import main\nmain()\n")
    program.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    shown = subprocess.run(
        [program, "--show-completion", "bash"], env=env, capture_output=True, text=True, timeout=scaled(60)
    )
    assert shown.returncode == 0, shown.stderr
    script = shown.stdout + (
        "\nCOMP_WORDS=(hf-rlhf train grpo advantages.use = leave)\nCOMP_CWORD=5\n"
        '_hf_rlhf_completion hf-rlhf\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=env, cwd=place, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["leave_one_out"], done.stderr


def test_the_arguments_read_off_the_source_are_those_of_the_class():
    from transformers import TrainingArguments

    fields = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    assert completion.training_arguments() == fields


def test_the_settings_read_off_a_plugins_source_are_settings_of_its_class():
    host = Host(disable="")
    complete = 0
    own = [offer for offer in host.offers() if offer.package == "hf_rlhf"]
    for offer in own:
        read = completion._settings(offer.axis, offer.name)
        settings = {field.name: field for field in settings_of(host.get(offer.axis, f"hf_rlhf/{offer.name}"))}
        assert read.keys() <= settings.keys(), offer
        complete += read.keys() == settings.keys()
        for name, default in read.items():
            if default:
                assert default == str(settings[name].default).lower() or default == str(settings[name].default)
    assert complete > len(own) / 2
