"""Runs of pipelines: files, skipped stages, resumed stages, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.run_folder import LOCK
from tests.helpers import offline_runs as off
from tests.helpers import stage_runs as st

NAMES = ("sft", "rm", "ppo")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A whole run and its summary. Who changes the folder copies it."""
    folder = tmp_path_factory.mktemp("done")
    return folder, st.run(folder)


@pytest.fixture
def again(done, tmp_path) -> Path:
    """A copy of its folder, whose stages' recipes name the same files."""
    shutil.copytree(done[0], tmp_path / "copy")
    return tmp_path / "copy"


def files(folder: Path) -> dict[str, bytes]:
    """What must not change when nothing is trained."""
    return {
        f"{name}/{file}": (folder / "out" / name / file).read_bytes()
        for name in NAMES
        for file in ("summary.json", "metrics.jsonl", "model.safetensors")
    }


def rerun(folder: Path, done: tuple[Path, dict[str, Any]], *words: str) -> dict[str, Any]:
    """The same staged recipe, over the first run's files, in a copy of its folder."""
    given = st.stages(done[0])
    return st.run(folder, *words, given=given)


def test_each_stage_leaves_what_a_run_leaves_and_one_summary_holds_them(done):
    folder, summary = done
    out = folder / "out"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert list(summary["stages"]) == list(NAMES)
    assert [stage["steps"] for stage in summary["stages"].values()] == [4, 4, 4]
    assert [stage["recipe"] for stage in summary["stages"].values()] == ["sft", "rm", "instructgpt_ppo"]
    assert {"tokens/perplexity", "loss"} <= summary["stages"]["sft"]["after"].keys()
    assert {"pairs/accuracy", "pairs/accuracy_low"} <= summary["stages"]["rm"]["after"].keys()
    ppo = summary["stages"]["ppo"]
    assert {"accuracy", "reward/reward_model/mean", "reward/exact_match/mean"} <= ppo["after"].keys()
    assert {"kl/rollout/sequence", "value/explained_var"} <= ppo["last"].keys()
    for name in NAMES:
        assert {"recipe.yaml", "summary.json", "metrics.jsonl", "model.safetensors"} <= {
            path.name for path in (out / name).iterdir()
        }
        assert [path.name for path in (out / name).glob("checkpoint-*")] == ["checkpoint-4"]
        assert json.loads((out / name / "summary.json").read_text())["recipe"] == f"tiny/{name}"


def test_a_stage_starts_from_what_an_earlier_one_left(done):
    """What the reward model's training moved least is near the fine-tuned model, not the first one; the critic has its head."""
    from hf_rlhf.cli.runs.run import train

    folder, _ = done
    staged = st.load_pipeline(st.write(folder))
    recipe = staged.stage("ppo").placed(folder / "out")
    recipe.training |= {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
    recipe.raw["training"] = dict(recipe.training)
    recipe.plugins["critic"].learning_rate = 0.0
    train(recipe, str(folder / "still"))
    policy, fine_tuned = off.weights(folder / "still"), off.weights(folder / "out" / "sft")
    assert all(torch.equal(policy[name].double(), fine_tuned[name].double()) for name in fine_tuned)
    critic, reward = off.weights(folder / "still" / "critic"), off.weights(folder / "out" / "rm")
    assert torch.equal(critic["head.weight"].double(), reward["score.weight"].double())
    trunk = {name.removeprefix("model."): x for name, x in reward.items() if name.startswith("model.")}
    assert all(torch.equal(critic[f"trunk.{name}"].double(), x.double()) for name, x in trunk.items())


def test_a_finished_run_trains_nothing_again(done, again, capsys):
    before = files(again)
    summary = rerun(again, done)
    assert files(again) == before
    assert summary["stages"].keys() == done[1]["stages"].keys()
    assert capsys.readouterr().out.count("(finished before)") == 3


def test_a_stage_that_is_removed_is_trained_anew_to_the_same_bits(done, again):
    before = files(again)
    shutil.rmtree(again / "out" / "ppo")
    rerun(again, done)
    after = files(again)
    same = [name for name in before if before[name] == after[name]]
    assert set(same) == {name for name in before if not name.startswith("ppo/")} | {"ppo/model.safetensors"}


def test_a_stage_that_read_another_run_of_an_earlier_one_is_refused(done, again):
    shutil.rmtree(again / "out" / "sft")
    with pytest.raises(UserError) as error:
        rerun(again, done)
    said = str(error.value)
    assert "rm read another run of sft than the one in this folder" in said
    assert "ppo read another run of sft" in said
    assert "remove the folders of the stages" in said
    for name in ("rm", "ppo"):
        shutil.rmtree(again / "out" / name)
    before = off.weights(done[0] / "out" / "ppo")
    rerun(again, done)
    assert off.same(off.weights(again / "out" / "ppo"), before)


def test_another_recipe_is_refused_with_the_key_that_differs(done, again):
    before = files(again)
    with pytest.raises(UserError) as error:
        rerun(again, done, "rm.training.learning_rate=0.5", "ppo.kl.0.beta=0.7")
    said = str(error.value).splitlines()
    assert "rm.training.learning_rate: 0.01 then, 0.5 now" in said[1]
    assert "ppo.kl.0.beta: 0.05 then, 0.7 now" in said[2]
    assert files(again) == before
    shutil.rmtree(again / "out" / "ppo")
    assert rerun(again, done, "ppo.kl.0.beta=0.7")["stages"]["ppo"]["steps"] == 4


def test_a_stage_that_is_no_more_is_refused(done, again):
    given = st.stages(done[0])
    given["judge"] = given.pop("rm")
    given["ppo"]["set"]["rewards"][0]["model"] = "stage:judge"
    given = {name: given[name] for name in ("sft", "judge", "ppo")}
    with pytest.raises(UserError, match="rm was a stage and is no longer one"):
        st.run(again, given=given)


def test_half_a_summary_does_not_count_and_the_stage_goes_on_from_its_checkpoint(tmp_path, capsys):
    given = {name: stage for name, stage in st.stages(tmp_path).items() if name != "ppo"}
    st.run(tmp_path, given=given)
    file = tmp_path / "out" / "rm" / "summary.json"
    file.write_text(file.read_text()[:50])
    before, kept = off.weights(tmp_path / "out" / "rm"), (tmp_path / "out" / "sft" / "summary.json").read_bytes()
    capsys.readouterr()
    summary = st.run(tmp_path, given=given)
    assert "rm, recipe rm (resumes)" in capsys.readouterr().out
    assert summary["stages"]["rm"]["steps"] == 4
    assert off.same(off.weights(tmp_path / "out" / "rm"), before)
    assert (tmp_path / "out" / "sft" / "summary.json").read_bytes() == kept


def test_a_stage_without_a_whole_checkpoint_begins_anew(done, again):
    shutil.rmtree(again / "out" / "ppo")
    (again / "out" / "rm" / "summary.json").unlink()
    (again / "out" / "rm" / "checkpoint-4" / "rlhf_manifest.json").unlink()
    (again / "out" / "rm" / "left").write_text("over")
    rerun(again, done)
    assert not (again / "out" / "rm" / "left").exists()
    assert off.same(off.weights(again / "out" / "rm"), off.weights(done[0] / "out" / "rm"))


def test_another_run_in_the_same_folder_is_refused(done, again):
    from filelock import FileLock

    with FileLock(again / "out" / LOCK), pytest.raises(UserError, match="another run is writing into"):
        rerun(again, done)
