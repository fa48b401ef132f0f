"""Models that cannot be trained or sampled as they are: refused at the start, or trained right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
)

from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.data.model_loading import ModelError
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.model_checks import lost_share
from hf_rlhf_plugins.rewards._models.batches import Row, scores_of
from tests.helpers import dpo_runs, offline_runs, runs, sft_runs
from tests.helpers.decoding import other

SAMPLED = {**runs.SAMPLED, "temperature": 2.0}
GRPO = ["dataset.path=builtin:addition", "training.use_cpu=true", "rollout.max_new_tokens=32"]
OFFLINE = ["sft", "dpo", "reward_model", "process_reward_model", "token_reward_model"]


def offline(folder: Path, trainer: str, *words: str) -> Any:
    """The recipe of an offline trainer over a tiny model."""
    if trainer in ("sft", "dpo"):
        return {"sft": sft_runs, "dpo": dpo_runs}[trainer].recipe(folder, *words)
    return offline_runs.recipe(folder, trainer, *words)


def train(recipe: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run leaves."""
    from hf_rlhf.cli.runs.run import train

    train(recipe, str(folder))
    return offline_runs.weights(folder)


def with_new_padding(folder: Path) -> None:
    """Give the saved tokenizer a padding token of which the model does not know."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


# Padding without an embedding


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"update": {"attention": "padded", "mini_batches": 2}},
        {"rollout": {**SAMPLED, "stop_strings": ["zzz"]}},
        {"critic": "separate", "advantages": "gae", "update": {"attention": "padded", "mini_batches": 2}},
        {"critic": "value_head", "advantages": "gae", "update": {"attention": "padded", "mini_batches": 2}},
        {"reference": "frozen", "kl": [{"use": "in_loss"}], "update": {"attention": "padded", "mini_batches": 2}},
    ],
    ids=["packed", "padded", "generate", "critic", "value head", "reference"],
)
def test_a_policy_trains_alike_whether_its_padding_token_has_a_row(parts, tmp_path, monkeypatch):
    due = runs.trained(tmp_path / "due", **{"rollout": SAMPLED, **parts})
    own = tiny_policy

    def tokenizer_with_padding(**options: Any) -> Any:
        model, tokenizer = own(**options)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        return model, tokenizer

    monkeypatch.setattr(runs, "tiny_policy", tokenizer_with_padding)
    found = runs.trained(tmp_path / "found", **{"rollout": SAMPLED, **parts})
    assert found.processing_class.pad_token_id == len(found.model.get_input_embeddings().weight)
    assert torch.equal(runs.parameters(found), runs.parameters(due))
    found.save_model(str(tmp_path / "saved"))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token == "[PAD]"
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("trainer", OFFLINE)
def test_rows_train_alike_whether_the_padding_token_has_a_row(trainer, tmp_path):
    due = train(offline(tmp_path / "due", trainer), tmp_path / "due" / "out")
    recipe = offline(tmp_path / "found", trainer)
    with_new_padding(tmp_path / "found" / "model")
    found = train(recipe, tmp_path / "found" / "out")
    assert found.keys() == due.keys()
    assert all(torch.equal(x, due[name]) for name, x in found.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "found" / "out").pad_token == "[PAD]"
    AutoModel.from_pretrained(tmp_path / "found" / "out")


def test_a_reward_model_whose_padding_has_no_row_scores_batches_as_rows(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(runs.save_classifier(tmp_path))
    model.config.pad_token_id = len(model.get_input_embeddings().weight)
    rows = [Row([5, 6, 7], None, False), Row([8], None, False), Row(list(range(3, 15)), None, False)]
    with torch.no_grad():
        found, due = (scores_of(model, rows, size, None, 0, "logit") for size in (3, 1))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(due))


def test_a_token_without_a_row_is_refused_before_training(tmp_path):
    model, tokenizer = tiny_policy()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = f"which has {rows}, got '<tool>' with id {rows}"
    with pytest.raises(ModelError, match=said):
        train(load_recipe("grpo", [*GRPO, f"model.path={tmp_path}"]), tmp_path / "out")
    for trainer in OFFLINE:
        with pytest.raises(ModelError, match=said):
            train(offline(tmp_path, trainer, f"model.path={tmp_path}"), tmp_path / trainer)


# Number formats


@pytest.mark.parametrize("trainer", ["grpo", *OFFLINE])
@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_float16_weights_are_not_trained(trainer, dtype, tmp_path):
    folder = offline_runs.save_model(tmp_path / "half", torch.float16)
    words = [f"model.path={folder}", f"model.dtype={dtype}"]
    recipe = (
        load_recipe("grpo", [*GRPO, "rollout.max_new_tokens=8", *words])
        if trainer == "grpo"
        else offline(tmp_path, trainer, *words)
    )
    for run in (check, train):
        with pytest.raises(UserError, match=r"model.dtype must not be float16.* Set model.dtype=bfloat16, or float32"):
            run(recipe, str(tmp_path / "out"))


@pytest.mark.parametrize("trainer", ["grpo", "sft"])
def test_float16_weights_that_the_configuration_does_not_mention_are_found(trainer, tmp_path):
    folder = offline_runs.save_model(tmp_path / "half", torch.float16)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16",', ""))
    words = [f"model.path={folder}", "model.dtype=auto"]
    recipe = (
        load_recipe("grpo", [*GRPO, "rollout.max_new_tokens=8", *words])
        if trainer == "grpo"
        else offline(tmp_path, trainer, *words)
    )
    with pytest.raises(UserError, match="must not be trained in float16, as"):
        train(recipe, tmp_path / "out")


def test_a_float16_policy_that_is_passed_is_refused_and_an_adapter_on_it_learns_as_on_float32(tmp_path):
    with pytest.raises(ValueError, match="must not be float16"):
        runs.trainer(tmp_path, dtype=torch.float16)
    whole, half = (
        runs.trained(tmp_path / str(dtype), dtype=dtype, lora=True, critic="separate", advantages="gae")
        for dtype in (torch.float32, torch.float16)
    )
    for made in (whole, half):
        assert {p.dtype for p in made.actor_critic.parameters() if p.requires_grad} == {torch.float32}
    moved = [
        torch.cat([p.detach().flatten() for name, p in made.model.named_parameters() if "lora_B" in name])
        for made in (whole, half)
    ]
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()


def test_check_says_what_bfloat16_weights_do(tmp_path):
    folder = offline_runs.save_model(tmp_path / "model", torch.bfloat16, initializer_range=0.05)
    sft = [sft_runs.recipe(tmp_path, f"model.path={folder}", f"model.dtype={x}") for x in ("auto", "float32")]
    for recipe in (sft[0], load_recipe("grpo", [*GRPO, f"model.path={folder}", "model.dtype=bfloat16"])):
        rate = recipe.training["learning_rate"]
        (said,) = [remark for remark in check(recipe, forecast=False).remarks if "bfloat16" in remark]
        assert f"learning_rate={rate:g}" in said
        assert f"{lost_share(rate, 0.05, 9):.1%} to {lost_share(rate, 0.05, 8):.1%}" in said
    assert not any("bfloat16" in remark for remark in check(sft[1], forecast=False).remarks)


# Policies that see the future, and those that decode one length at a time


@pytest.mark.parametrize("dropout", [False, True])
def test_a_policy_that_sees_the_future_is_refused(dropout, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    policy = BertLMHeadModel(BertConfig(vocab_size=300, **sizes))
    with pytest.raises(ModelError, match="BertLMHeadModel attends to later tokens"):
        runs.trainer(tmp_path, policy=policy, model={"dropout": dropout})


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_rows_do_not_train_an_encoder_as_a_policy(trainer, tmp_path):
    folder = tmp_path / "model"
    other("bert", is_decoder=False).save_pretrained(folder)
    tiny_policy()[1].save_pretrained(folder)
    with pytest.raises(ModelError, match="BertLMHeadModel attends to later tokens"):
        train(offline(tmp_path, trainer, "model.dtype=float32"), tmp_path / "out")


def test_a_recurrent_policy_is_sampled_one_length_at_a_time_and_resumes_with_equal_bits(tmp_path):
    options: dict[str, Any] = {"rollout": SAMPLED, "data": [{"prompt": "1" * n + "="} for n in (1, 2, 3, 4, 4, 2)]}

    def made(folder: Path, steps: int, **training: Any) -> Any:
        given = {"training": {"max_steps": steps, **training}, **options}
        return runs.trainer(folder, policy=other("recurrent_gemma"), **given)

    whole = made(tmp_path / "whole", 6)
    assert sum("one length after the other" in remark for remark in whole.plan.remarks) == 1
    assert whole.record["plan"]["remarks"] == whole.plan.remarks
    whole.train()
    made(tmp_path / "parts", 4, save_strategy="steps", save_steps=2).train()
    again = made(tmp_path / "parts", 6)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert torch.equal(runs.parameters(again), runs.parameters(whole))


def test_check_says_that_a_recurrent_policy_is_sampled_one_length_at_a_time(tmp_path):
    other("recurrent_gemma").save_pretrained(tmp_path)
    words = [*GRPO, f"model.path={tmp_path}", "rollout.prompts=6"]
    (said,) = [x for x in check(load_recipe("grpo", words), forecast=False).remarks if "one length" in x]
    assert said.startswith("rollout=generate: ")
    assert "the 6 prompts of a rollout take up to 6 times as long as one batch" in said
