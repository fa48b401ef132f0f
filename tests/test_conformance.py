"""The conformance kit: every registered plugin passes it, and wrong plugins fail it with the reason."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from wrong_plugins import WRONG, Estimator, HalfDetached, Loss, OtherColumn, Reward

from hf_rlhf import load_plugin
from hf_rlhf.axes import Context, Plugin
from hf_rlhf.batch import Rollouts
from hf_rlhf.testing import conformance, rollouts, scored, tiny_policy

REGISTERED = sorted(
    {point.name for point in entry_points(group="hf_rlhf") if point.dist and point.dist.name == "hf_rlhf"}
)


def count_fives(rollouts: Rollouts) -> list[float]:
    return [float(text.count("5")) for text in rollouts.completions]


def with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        return peft.get_peft_model(tiny_policy()[0], peft.LoraConfig(target_modules="all-linear"))


def reward_model(folder: Path) -> Plugin:
    from transformers import LlamaForSequenceClassification

    policy, tokenizer = tiny_policy()
    policy.config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        LlamaForSequenceClassification(policy.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = load_plugin("rewards", "reward_model", model=str(folder))
    cpu = torch.device("cpu")
    source.setup(Context(device=cpu, tokenizer=tokenizer, policy=policy, seed=0, process_index=0, num_processes=1))
    return source


def test_the_built_in_plugins_are_registered():
    assert {"advantages.gae", "kl.in_loss", "filters.zero_variance"} <= set(REGISTERED)


@pytest.mark.parametrize("key", REGISTERED)
def test_registered_plugins_conform(key: str, tmp_path: Path):
    axis, _, name = key.partition(".")
    settings: dict[str, Any] = {}
    if key == "rewards.function":
        settings = {"function": f"{__file__}:count_fives"}
    plugin = reward_model(tmp_path) if key == "rewards.reward_model" else load_plugin(axis, name, **settings)
    facts = conformance(plugin, policy=with_adapter if key == "reference.adapter_off" else None)
    assert len(facts) >= 3
    try:
        for fact in facts:
            fact()
    finally:
        plugin.close()


@pytest.mark.parametrize("axis", ["kl", "advantages"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_other_settings_conform(axis: str, level: str):
    plugins = {
        "kl": [load_plugin("kl", name, level=level, estimator="k2") for name in ("in_reward", "in_loss", "monitor")],
        "advantages": [
            load_plugin("advantages", "gae", gamma=0.9, lam=0.5, whiten=level == "token"),
            load_plugin("advantages", "reward_to_go", gamma=0.9),
            load_plugin("advantages", "reinforce", gamma=0.9),
        ],
    }
    for plugin in plugins[axis]:
        for fact in conformance(plugin):
            fact()


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_plugin_is_caught_with_the_reason(make: Any, message: str):
    said = []
    for fact in conformance(make()):
        try:
            fact()
        except Exception as error:
            said.append(str(error))
    assert any(re.search(message, text) for text in said), said


def test_a_right_plugin_has_nothing_to_answer_for():
    for plugin in (Estimator(), Loss(), Reward()):
        for fact in conformance(plugin):
            fact()


def test_a_stopped_gradient_can_be_meant():
    for fact in conformance(HalfDetached(), finite_differences=False):
        fact()


def test_facts_read_as_sentences():
    titles = [str(fact) for fact in conformance(Estimator())]
    assert "advantages.wrong: padding columns change nothing" in titles
    assert len(titles) == len(set(titles))


def test_a_reward_with_columns_of_its_own_conforms_on_rollouts_that_have_them():
    own = rollouts(columns={"solution": [1.0, None, 0.5, 0.0]})
    for fact in conformance(OtherColumn(), rollouts=own):
        fact()


def test_what_is_no_plugin_is_refused():
    with pytest.raises(TypeError, match="str is no plugin"):
        conformance("group_norm")  # type: ignore[arg-type]


def test_scored_has_groups_of_each_size_and_tool_tokens_between():
    batch = scored(group_sizes=(2, 1, 3), length=6)
    assert batch.group_size().tolist() == [2, 2, 1, 3, 3, 3]
    ends = batch.mask.shape[1] - batch.mask.flip(1).argmax(1)
    assert (batch.mask.sum(1) > 0).all()
    assert (batch.mask.sum(1) < ends).any()
    assert torch.equal(scored(seed=3).token_rewards, scored(seed=3).token_rewards)
    assert scored(values=None).values is None


def test_the_tiny_policy_reads_and_writes_any_ascii():
    model, tokenizer = tiny_policy()
    text = "2+3=5\n#### Yes {it} is."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer))
    made = rollouts([text])
    assert tokenizer.decode(made.completion_ids[0], skip_special_tokens=True) == text
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "user: hi\nassistant: "


def test_the_tiny_policy_leaves_the_random_generators_alone():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    tiny_policy()
    assert torch.equal(torch.rand(1), first)
