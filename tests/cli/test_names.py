"""Names on the command line: what is misspelt, from another library, or not there is answered soon and with what is meant."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_rlhf.cli import main
from hf_rlhf.config.mappings import rows
from hf_rlhf.registry.host import Host, use_host
from tests.helpers.waits import scaled


@pytest.fixture
def fails(monkeypatch, capfd):
    """Runs `hf-rlhf WORDS` in this process and returns its error."""

    def run(*words: str, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["hf-rlhf", *words])
        with use_host(Host()), pytest.raises(SystemExit) as stopped:
            main.main()
        said = capfd.readouterr()
        assert stopped.value.code == code, said
        return said.out if code == 0 else said.err

    monkeypatch.setenv("HF_RLHF_TRACEBACK", "")
    return run


def installed(folder: Path, *words: str, **environment: str) -> tuple[str, float, float]:
    """(error, seconds of CPU, seconds) of the installed program."""
    program = str(Path(sys.executable).with_name("hf-rlhf"))
    env = {name: x for name, x in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [program, *words],
        cwd=folder,
        env={**env, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=scaled(60),
    )
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    return done.stderr, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, seconds


# How long it takes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpro"], "no recipe named 'gpro'. Did you mean 'grpo'"),
        (["grpo", "--loss_type", "dapo"], "TRL's GRPOConfig: loss_type -> aggregation.use=token_mean"),
        (["grpo", "advantages.use=ppo"], "'ppo' is a recipe, and uses gae on this axis"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_name_error_takes_little_time(words, says, tmp_path):
    said, cpu, _ = installed(tmp_path, "train", *words)
    assert says in said
    assert cpu < scaled(0.4)


def test_a_model_that_is_not_there_is_refused_soon(tmp_path):
    (tmp_path / "tiny").mkdir()
    with socket.socket() as refusing, socket.create_server(("127.0.0.1", 0)) as mute:
        refusing.bind(("127.0.0.1", 0))
        at = [f"http://127.0.0.1:{place.getsockname()[1]}" for place in (refusing, mute)]
        for environment, limit, says in (
            ({"HF_HUB_OFFLINE": "1"}, 1, "HF_HUB_OFFLINE"),
            ({"HF_ENDPOINT": at[0]}, 1, "could not be reached"),
            ({"HF_ENDPOINT": at[1]}, 3, "did not answer within 1 s"),
        ):
            words = ("train", "quickstart", "--model", "tinny", "--dataset", "rows")
            said, cpu, seconds = installed(tmp_path, *words, **environment)
            assert "model.path: no model folder tinny. Did you mean 'tiny'?" in said
            assert "dataset.path: no dataset file or folder rows." in said
            assert says in said
            assert "tokenizer" not in said
            assert seconds < scaled(limit)
            assert cpu < scaled(0.8), "torch must not be imported for it"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rewards.0={use: reward_model, model: ./none}", "rewards.0.model: no model folder ./none"),
        ("rewards.0={use: token_reward_model, model: ./none}", "rewards.0.model: no model folder ./none"),
        ("critic={use: separate, init: ./none}", "critic.init: no model folder ./none"),
        ("loss_terms=[{use: ptx, path: ./none}]", "loss_terms.0.path: no dataset file or folder ./none"),
        ("model.tokenizer=./none", "model.tokenizer: no folder ./none"),
        ("dataset.eval_path=./none", "dataset.eval_path: no dataset file or folder ./none"),
    ],
)
def test_every_setting_that_names_a_model_or_a_dataset_is_looked_up(override, says, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails("train", "quickstart", override)


def test_a_critic_from_the_policy_or_the_reward_model_names_no_model(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for init in ("policy", "reward"):
        said = fails("train", "quickstart", f"critic={{use: separate, init: {init}}}", "--model", "./none")
        assert "critic.init" not in said


# What another library's name is here


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--use_vllm"], "not supported: the training process generates"),
        (["--reward_funcs", "mine.score"], "rewards.0={use: function"),
        (["--init_kl_coef", "0.1"], "algo.kl.init_coef -> kl.0.beta=0.01"),
        (["--algo.kl.init-coef=0.1"], "algo.kl.init_coef -> kl.0.beta=0.01"),
        (["--lora_rank", "8"], "model.lora={r: "),
        (["beta=0.1"], "TRL's DPOConfig: beta -> trainer.beta=0.1"),
        (["lr=1e-6"], "training.learning_rate=1e-6"),
        (["learning_rate=1e-6"], "Write training.learning_rate="),
        (["num_generations=8"], "rollout.num_generations=8"),
        (["actor_rollout_ref.actor.kl_loss_coef=0.1"], "kl.0={use: in_loss, beta: 0.001"),
        (["+actor_rollout_ref.rollout.n=5"], "rollout.num_generations=5"),
        (["critic.optim.lr=1e-5"], "critic.optim.lr -> critic.learning_rate=1e-5"),
        (["trainer.total_epochs=1"], "training.num_train_epochs=15"),
        (["actor_rollout_ref.actor.fsdp_config.param_offload=true"], "FSDP2"),
        (["training.beta=0.1"], "kl.0.beta=0.04"),
        (["rollout.max_completion_length=9"], "rollout.max_new_tokens=512"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_name_of_another_library_is_answered_with_its_row(words, says, fails):
    assert says in fails("check", "grpo", *words)


def test_every_name_in_the_tables_is_found_by_itself():
    from hf_rlhf.config.mappings import mapped

    assert len(rows()) > 150
    for row in rows():
        for name in row.names:
            assert row.text in mapped(name) or mapped(name).count("->") >= 4, name


def test_no_key_of_a_recipe_is_taken_for_one_of_another_library():
    from hf_rlhf.config.recipe import load_recipe

    recipe = load_recipe("ppo", ["critic.learning_rate=1e-5", "critic.value_clip=0.3", "critic.warmup_steps=2"])
    assert recipe.plugins["critic"].value_clip == 0.3
    assert load_recipe("dpo", ["trainer.beta=0.2", "trainer.max_length=64"]).plugins["trainer"].beta == 0.2


# What a name means elsewhere


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("advantages.use=grpo", "uses group_norm on this axis"),
        ("advantages=ppo@verl", "uses gae on this axis"),
        ("advantages.use=hf_rlhf/rloo", "uses leave_one_out on this axis"),
        ("policy_loss.use=grpo", "uses ppo_clip on this axis"),
        ("aggregation.use=dr_grpo", "uses seq_mean_token_sum_norm on this axis"),
        ("kl.0.use=grpo", "uses in_loss on this axis"),
        ("kl.0.use=dapo", "uses nothing on this axis"),
        ("kl.0.estimator.use=grpo", "uses k3 on this axis"),
        ("kl.0.estimator.use=remax", "uses k1 on this axis"),
        ("advantages.use=dpo", "'dpo' is a recipe, which leaves advantages out"),
        ("advantages.use=r1", "'r1' is a recipe, which leaves advantages out"),
        ("advantages.use=token_mean", "'token_mean' is a plugin: aggregation.use=token_mean"),
    ],
)
def test_a_recipe_or_another_axis_plugin_named_on_an_axis(override, says, fails):
    assert says in fails("check", "grpo", override)


def test_a_plugin_named_as_a_recipe(fails):
    assert "'group_norm' is a plugin: advantages.use=group_norm" in fails("train", "group_norm")


@pytest.mark.parametrize(
    "words", [["group_norm"], ["advantages.group_norm"], ["group_norm", "advantages"], ["hf_rlhf/group_norm"]]
)
def test_show_finds_the_axis_of_a_plugin(words, fails):
    assert fails("show", *words, code=0).startswith("advantages.group_norm, from hf_rlhf")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("none", "a plugin of 3 axes: `show critic none` or `show rollout_correction none` or `show reference none`"),
        ("reward_model", "`show rewards reward_model` or `show trainer reward_model`"),
        ("grpo", "'grpo' is a recipe: `hf-rlhf recipes show grpo`"),
        ("gruop_norm", "no axis and no plugin named 'gruop_norm'. Did you mean 'group_norm'?"),
        ("advantage", "Did you mean 'advantages'"),
    ],
)
def test_show_says_what_a_word_may_be(word, says, fails):
    assert says in fails("show", word)


def test_a_misspelt_command(fails):
    assert "no command 'trian'. Did you mean 'train'? The commands are: train, check" in fails("trian", "grpo")
    assert "no command 'chek'. Did you mean 'check'?" in fails("plugins", "chek")
