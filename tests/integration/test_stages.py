"""Staged recipes: what may be said, what is refused before anything runs, and how stages read each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_rlhf.cli.runs.pipeline_run import check_named, check_stages, choose_root
from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe, resolve
from hf_rlhf.config.recipe_yaml import RecipeError, read_yaml
from hf_rlhf.runtime.errors import UserError
from tests.helpers import stage_runs as st

STAGED = ("instructgpt", "dpo_pipeline", "deepspeed_chat", "r1")


def invoke(*words: str) -> Any:
    from hf_rlhf.cli.app import app
    from hf_rlhf.cli.main import add_commands

    add_commands()
    return CliRunner().invoke(app, list(words), terminal_width=200)


def refused(folder: Path, change: dict[str, Any], *words: str) -> str:
    """What is said of the small staged recipe with some stages replaced."""
    with pytest.raises(UserError) as error:
        check_stages(load_pipeline(st.write(folder, {**st.stages(folder), **change}), words), folder / "out")
    return str(error.value)


# What it means


def test_a_stage_is_its_recipe_with_what_is_set(tmp_path):
    staged = load_pipeline(st.write(tmp_path), ["ppo.kl.0.beta=0.3", "rm.training.seed=9"], seed=4)
    assert staged.name == "tiny"
    assert [stage.name for stage in staged.stages] == ["sft", "rm", "ppo"]
    sft, rm, ppo = (stage.placed(tmp_path / "out") for stage in staged.stages)
    assert [made.name for made in (sft, rm, ppo)] == ["tiny/sft", "tiny/rm", "tiny/ppo"]
    assert [made.training["seed"] for made in (sft, rm, ppo)] == [4, 9, 4]
    assert ppo.raw["kl"][0]["beta"] == 0.3
    assert (rm.model.path, ppo.model.path) == (str(tmp_path / "out" / "sft"),) * 2
    assert staged.stage("rm").placed(Path("out")).model.path == str(Path("out/sft").absolute())
    assert ppo.plugins["rewards"][0].model == str(tmp_path / "out" / "rm")
    assert ppo.raw["training"]["save_steps"] == 0.1
    assert staged.stage("ppo").reads == {"rewards.0.model": ("rm", ""), "model.path": ("sft", "")}


def test_what_was_run_can_be_run_again(tmp_path):
    staged = load_pipeline(st.write(tmp_path), ["ppo.kl.0.beta=0.3", "ppo.recipe=grpo", "sft.dataset.name=#1"], seed=4)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "recipe.yaml").write_text(staged.dump())
    again = load_pipeline(tmp_path / "again" / "recipe.yaml")
    assert again.name == "again"
    assert [stage.recipe.raw for stage in again.stages] == [stage.recipe.raw for stage in staged.stages]


def test_another_algorithm_is_one_override(tmp_path):
    staged = load_pipeline(st.write(tmp_path), ["ppo.recipe=grpo", "ppo.rollout.max_new_tokens=32"])
    made = staged.stage("ppo").recipe
    assert made.plugins["advantages"].name == load_recipe("grpo").plugins["advantages"].name
    assert made.plugins["critic"].name == "none"
    check_stages(staged, tmp_path / "out")
    assert (
        load_pipeline("instructgpt", ["ppo.recipe=grpo"]).stage("ppo").recipe.plugins["rewards"][0].model == "stage:rm"
    )


def test_a_place_in_a_stages_folder_can_be_read(tmp_path):
    given = st.stages(tmp_path)
    given["ppo"]["set"]["model.tokenizer"] = "stage:sft/checkpoint-4"
    staged = load_pipeline(st.write(tmp_path, given))
    assert staged.stage("ppo").placed(tmp_path).model.tokenizer == str(tmp_path / "sft" / "checkpoint-4")


def test_a_recipe_that_saves_as_it_likes_is_left_alone(tmp_path):
    given = st.stages(tmp_path)
    given["rm"]["set"]["training.save_strategy"] = "no"
    training = load_pipeline(st.write(tmp_path, given)).stage("rm").recipe.training
    assert "save_steps" not in training


# What is refused


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("rm", {"model.path": "stage:sfd"}, r"rm.model.path: there is no stage 'sfd'. Did you mean 'sft'?"),
        (
            "sft",
            {"model.path": "stage:rm"},
            "sft.model.path: stage:rm comes later; a stage can read earlier ones: there are none",
        ),
        ("rm", {"model.path": "stage:rm"}, "rm.model.path: stage:rm is this stage itself"),
        ("rm", {"dataset.path": "stage:sft"}, "rm.dataset.path: stage:sft is a model's folder"),
        (
            "ppo",
            {"model.path": "stage:rm"},
            "ppo.model.path: stage:rm is a sequence classifier, and a language model",
        ),
        ("ppo", {"rewards.0.model": "stage:sft"}, "stage:sft leaves no reward model, and rewards.reward_model"),
        ("ppo", {"kl.0.beta": "much"}, "stage ppo: the recipe tiny/ppo has one problem"),
        ("rm", {"trainer.margn": 1}, "trainer.margn: trainer=reward_model has no such setting. Did you mean 'margin'?"),
        ("rm", {"dataset.path": "/nowhere/rows.jsonl"}, "stage rm: "),
        ("ppo", {"rollout.prompts": 400}, "stage ppo: rollout.prompts=400 and the dataset has 36 rows"),
        ("sft", {"training.fp16": True}, "stage sft: training.fp16=True is refused"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_by_its_name(stage, change, message, tmp_path):
    given = st.stages(tmp_path)
    place = {"recipe": given[stage]["recipe"], "set": {**given[stage]["set"], **change}}
    if "rewards.0.model" in change:
        place["set"] = {key: value for key, value in place["set"].items() if key != "rewards"} | change
    assert message in refused(tmp_path, {stage: place})


def test_every_stage_is_checked_before_the_first_one_runs(tmp_path):
    given = st.stages(tmp_path)
    given["sft"]["set"]["training.fp16"] = True
    given["ppo"]["set"]["rollout.prompts"] = 400
    said = refused(tmp_path, given)
    assert "stage sft: training.fp16" in said
    assert "stage ppo: rollout.prompts=400" in said
    with pytest.raises(UserError):
        st.run(tmp_path, given=given)
    assert not (tmp_path / "out").exists()


def test_a_stage_without_model_or_dataset_is_refused_before_it_runs():
    with pytest.raises(UserError) as error:
        check_named(load_pipeline("r1"))
    said = str(error.value).splitlines()
    assert said[0] == "stage sft has no model: set sft.model.path=..."
    assert said[-1] == "stage rl has no dataset: set rl.dataset.path=..."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {}", "stages: must be a mapping"),
        ("stages: [a]", "stages: must be a mapping"),
        ("stages: {a: sft}\nmodel: {}", "model: a recipe with stages has only the key stages"),
        ("stages: {a-b: sft}", "stages.a-b: a stage's name must consist of letters, digits and underscores"),
        ("stages: {a: {set: {}}}", "stages.a: must be `{recipe: RECIPE, set: {KEY: VALUE}}`"),
        ("stages: {a: {recipe: sft, set: [1]}}", "stages.a.set: must be a mapping of dotted keys"),
        ("stages: {a: {recipe: sft, seed: 1}}", "stages.a.seed: unknown key; a stage has recipe, set"),
        ("stages: {a: nothing}", "stage a: no recipe named 'nothing'"),
        ("stages: {a: instructgpt}", "stage a: its recipe instructgpt has stages itself"),
    ],
)
def test_a_file_that_is_no_staged_recipe_is_refused(text, message, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_pipeline(tmp_path / "wrong.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pp.kl.0.beta=1", "there is no stage 'pp'. Did you mean 'ppo'? The stages are: sft, rm, ppo"),
        ("kl.0.beta=1", "there is no stage 'kl'."),
        ("ppo=grpo", "write STAGE.KEY=VALUE"),
        ("ppo.kl", "write STAGE.KEY=VALUE"),
        ("ppo.set.kl=[]", "write ppo.KEY=VALUE without set"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(word, message):
    with pytest.raises(RecipeError) as error:
        load_pipeline("instructgpt", [word])
    assert message in str(error.value)


def test_what_does_not_fit_another_recipe_is_refused_with_the_stage():
    with pytest.raises(UserError, match=r"(?s)stage ppo: .*has only trainer, model, dataset, training"):
        load_pipeline("instructgpt", ["ppo.recipe=rm"])
    with pytest.raises(UserError, match=r"(?s)stage ppo: .*critic"):
        load_pipeline("instructgpt", ["ppo.recipe=grpo", "ppo.critic.int=reward"])


def test_recipes_of_one_kind_are_refused_where_the_other_is_due(tmp_path):
    with pytest.raises(UserError, match="grpo has no stages: use `hf-rlhf train grpo`"):
        load_pipeline("grpo")
    said = r"instructgpt has stages \(sft, rm, ppo\), each with a recipe of its own: run them with `hf-rlhf pipeline"
    with pytest.raises(UserError, match=said):
        load_recipe("instructgpt", ["ppo.kl=[]"])
    with pytest.raises(UserError, match="has stages"):
        resolve({"stages": {}})
    assert is_pipeline("instructgpt")
    assert not is_pipeline("grpo")
    assert not is_pipeline("nothing")
    for words in (["train", "instructgpt"], ["explain", "instructgpt"], ["lab", "instructgpt"]):
        assert "has stages" in str(invoke(*words).exception)


# Commands


def test_check_prints_the_plan_of_every_stage(tmp_path):
    result = invoke("check", st.write(tmp_path), "--seed", "3", "ppo.rollout.prompts=4")
    assert result.exit_code == 0, result.exception
    for line in ("stage sft: recipe sft", "stage ppo: recipe instructgpt_ppo", "  rewards.0.model is the output of rm"):
        assert line in result.stdout
    assert result.stdout.count("\nbatches") == 3
    assert "without what stage rm will leave in outputs/tiny/rm" in result.stdout
    assert "has stages; write STAGE.KEY=VALUE" in str(invoke("check", "instructgpt", "--model", "x").exception)
    assert "has stages; write STAGE.KEY=VALUE" in str(invoke("check", "instructgpt", "--beta", "1").exception)


def test_staged_recipes_are_listed_and_shown():
    listed = invoke("recipes").stdout
    assert all(name in listed for name in STAGED)
    assert "stages:" in invoke("recipes", "show", "instructgpt").stdout


@pytest.mark.parametrize("name", STAGED)
def test_the_packaged_ones_are_checked_as_a_whole(name, tmp_path):
    staged = load_pipeline(name)
    plans = check_stages(staged, tmp_path)
    assert list(plans) == [stage.name for stage in staged.stages]
    assert isinstance(staged.stages[0].recipe, OfflineRecipe)
    assert load_staged_text(staged.dump()) == [stage.name for stage in staged.stages]


def load_staged_text(text: str) -> list[str]:
    return list(read_yaml(text, "dump")["stages"])


def test_a_folder_of_another_run_is_not_written_into(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_root(None, "tiny", True) == choose_root(None, "tiny", False) == Path("outputs/tiny")
    (tmp_path / "outputs" / "tiny").mkdir(parents=True)
    (tmp_path / "outputs" / "tiny" / "stages.json").write_text("{}")
    assert choose_root(None, "tiny", True) == Path("outputs/tiny")
    assert choose_root(None, "tiny", False) == Path("outputs/tiny-2")
    with pytest.raises(UserError, match=r"already contains a run\. Leave --no-resume out"):
        choose_root("outputs/tiny", "tiny", False)
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="contains the run of a single recipe"):
        choose_root("single", "tiny", True)
