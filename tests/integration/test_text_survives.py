"""Runs whose text needs care: special-token tags, templates that refuse, pairs of whole conversations."""

from __future__ import annotations

import json

import pytest
from transformers import TrainingArguments

from hf_rlhf import RLHFTrainer, load_recipe
from hf_rlhf.batch import Context
from hf_rlhf.data.sources import DatasetError
from hf_rlhf.training.offline.setup import make_trainer
from hf_rlhf.training.setup import AlgorithmError, check_recipe
from tests.helpers.chats import chat_tokenizer
from tests.helpers.models import tiny_llama
from tests.helpers.runs import BASE, resolve, save_classifier

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
GOOD = "<think>two</think> <answer>4</answer>"
ULTRAFEEDBACK = [
    {
        "prompt": question,
        "prompt_id": str(number),
        "chosen": [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {number}."}],
        "rejected": [{"role": "user", "content": question}, {"role": "assistant", "content": f"Is it {number}{bad}?"}],
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {number}."}],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }
    for number in range(20)
    for bad in (1, 2)
    for question in [f"What is {number}+0?"]
]
"""Rows of the schema of HuggingFaceH4/ultrafeedback_binarized, two for each prompt."""


def saved(folder, template="chatml", special=(), **options):
    tokenizer = chat_tokenizer(template, special=special)
    tiny_llama(vocab_size=300, eos_token_id=tokenizer.eos_token_id, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(folder, model, rows, **parts):
    args = TrainingArguments(str(folder / "out"), use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    scripted = {**BASE["rollout"], "prompts": 1, "num_generations": 2, **parts.pop("rollout", {})}
    recipe = resolve({**BASE, "update": {}, "rollout": scripted, **parts})
    return RLHFTrainer(model, recipe, args, train_dataset=rows)


def format_recipe(model, *words):
    short = ["rewards=[{use: format}]", "dataset.path=null", "rollout.max_new_tokens=32"]
    return load_recipe("r1_zero", [f"model.path={model}", *short, *words])


def test_tags_that_are_special_tokens_reach_rewards_or_the_run_is_refused(tmp_path):
    model = saved(tmp_path / "model", special=TAGS)
    rows = [{"prompt": "2+2=", "answer": "4", "completions": [GOOD, "4"]}]
    rewards = [{"use": "format"}]
    refusal = (
        r"rewards\.format asks for </answer>, </think>, <answer>, <think>, which can never .*skip_special_tokens=false"
    )
    with pytest.raises(AlgorithmError, match=refusal):
        trainer(tmp_path, model, rows, rewards=rewards)
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(AlgorithmError, match=refusal):
        check_recipe(format_recipe(model), args)
    check_recipe(format_recipe(model, "rollout.skip_special_tokens=false"), args)
    made = trainer(tmp_path, model, rows, rewards=rewards, rollout={"skip_special_tokens": False})
    buffer = made.collector.collect(0)
    made.close()
    assert buffer.extra["texts"]["completion"] == [GOOD, "4"]
    assert buffer.extra["numbers"]["reward/format"].tolist() == [1.0, 0.0]


def test_a_row_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    from hf_rlhf.training import setup

    model = saved(tmp_path / "model", "gemma")
    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("the model was loaded"))
    rows = [{"prompt": "2+2=", "answer": "4", "completions": ["4", "5"]}]
    with pytest.raises(DatasetError, match=r"row 1 .*dataset\.system is a message .*: System role not supported"):
        trainer(tmp_path, model, rows, dataset={"chat": True, "system": "Be brief."})


@pytest.mark.parametrize("name", ["dpo", "rm"])
def test_pairs_of_whole_conversations_train_without_conversion(tmp_path, name):
    model, file = saved(tmp_path / "model"), tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ULTRAFEEDBACK))
    words = [f"model.path={model}", f"dataset.path={file}", "training.use_cpu=true", "training.max_steps=1"]
    words += ["training.learning_rate=0.01", "training.per_device_train_batch_size=4", "dataset.held_out=4"]
    with pytest.raises(
        DatasetError, match=r"row \d+ .*chosen must be a text, like prompt.*set dataset\.prompt_column=null"
    ):
        make_trainer(load_recipe(name, words), str(tmp_path / "out"))
    made = make_trainer(load_recipe(name, [*words, "dataset.prompt_column=null"]), str(tmp_path / "out"))
    tokenizer = chat_tokenizer("chatml")
    rows = [*made.train_dataset, *made.eval_dataset]
    assert len(rows) == len(ULTRAFEEDBACK)
    text = tokenizer.decode(rows[0]["chosen_ids"])
    assert text.count("<|im_start|>user\nWhat is 0+0?<|im_end|>") == 1
    assert "It is 0." in text
    held_out = {tokenizer.decode(row["chosen_ids"]) for row in made.eval_dataset}
    assert len(made.eval_dataset) == 4
    assert not held_out & {tokenizer.decode(row["chosen_ids"]) for row in made.train_dataset}, "no prompt is in both"
    if name == "dpo":
        assert (
            tokenizer.decode(rows[0]["prompt_ids"])
            == "<|im_start|>user\nWhat is 0+0?<|im_end|>\n<|im_start|>assistant\n"
        )
    made.train()


def test_pairs_of_texts_have_their_common_start_as_their_prompt(tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = [
        {"chosen": f"Human: {i}?\n\nAssistant: yes {i}", "rejected": f"Human: {i}?\n\nAssistant: no"} for i in range(3)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    words = [f"model.path={saved(tmp_path / 'model')}", f"dataset.path={file}", "training.use_cpu=true"]
    words += ["training.max_steps=1"]
    with pytest.raises(DatasetError, match=r"need a column prompt\. Set dataset\.prompt_column=null"):
        make_trainer(load_recipe("dpo", words), str(tmp_path / "out"))
    made = make_trainer(load_recipe("dpo", [*words, "dataset.prompt_column=null"]), str(tmp_path / "out"))
    row = made.train_dataset[0]
    decode = chat_tokenizer("chatml").decode
    assert decode(row["prompt_ids"]) == "Human: 0?\n\nAssistant:"
    assert decode(row["chosen_ids"]) == "Human: 0?\n\nAssistant: yes 0<|im_end|>"


def test_a_reward_model_reads_what_the_policy_was_asked_and_said(tmp_path):
    """Variables of the template, thoughts that the prompt opened, and a turn that the prompt began."""
    from hf_rlhf import load_plugin
    from hf_rlhf.testing import rollouts

    reward = load_plugin("rewards", "reward_model", model=save_classifier(tmp_path / "reward"))
    import torch

    reward.setup(Context(device=torch.device("cpu"), tokenizer=None, policy=None, chat_template_kwargs={"word": "!"}))
    question = {"role": "user", "content": "2+2?"}
    template = "{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + word + '\n' }}{% endfor %}"
    with reward._session() as held:
        held.tokenizer.chat_template = template

        def texts(prompt, opening=""):
            given = rollouts(["so</think> 4"], prompts=[prompt])
            given.openings = [opening]
            row = reward._row(held, prompt, given.completions[0], opening, None)
            return held.tokenizer.decode(row.ids)

        assert texts([question]) == "u: 2+2?!\na: so</think> 4!\n"
        assert texts([question], "<think>") == "u: 2+2?!\na: <think>so</think> 4!\n"
        begun = [question, {"role": "assistant", "content": "<think>"}]
        assert texts(begun, "<think>") == "u: 2+2?!\na: <think>so</think> 4!\n"
