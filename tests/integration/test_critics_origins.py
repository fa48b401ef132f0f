"""Where a critic's weights start: with the scores of a reward model of any kind, and never on another model's tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from hf_rlhf import load_plugin
from hf_rlhf.axes import Context
from hf_rlhf.modeling.policy import ActorCritic, TokenBatch
from hf_rlhf.testing import tiny_policy
from hf_rlhf_plugins.critic._origins import first_difference
from tests.helpers import runs
from tests.helpers.classifiers import (
    CPU,
    configuration,
    given,
    merging_tokenizer,
    save_model,
    save_sequence_classifier,
    save_three,
    save_token_classifier,
    spaced_tokenizer,
)
from tests.unit.plugins.test_reward_models_heads import linear, named, save_headed

TEXTS = ["12ab1", "x y", "ab12ab! 12"]
EOS = 261


def policy(arch: str = "llama", **options: Any) -> Any:
    """A causal model over the tokens of `merging_tokenizer`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(configuration(arch, pad_token_id=0, **options)).eval()


def critic_of(source: Any, **settings: Any) -> Any:
    algorithm: Any = SimpleNamespace(rewards=[source])
    return load_plugin("critic", "separate", init="reward", **settings).build(policy(), algorithm)


def value(critic: Any, text: str) -> float:
    """In the state after the text, from which its end of sequence is chosen."""
    ids = merging_tokenizer()(text)["input_ids"]
    batch = TokenBatch([ids[:2]], [[*ids[2:], EOS]], torch.ones(1, len(ids) - 1), 0)
    with torch.no_grad():
        return ActorCritic(policy(), critic, 1.0)(batch, values=True, logps=False)["values"][0, -1].item()


def scores(source: Any) -> list[float]:
    """Of each text: a sequence's score, or the one at its last token or step."""
    found = source(given(TEXTS, prompts=[""] * len(TEXTS)))
    return [x if isinstance(x, float) else x.values[-1][1] for x in found]


# With the reward model's scores


def two_layers(folder: Path, outputs: int = 1) -> str:
    layers = nn.Sequential(linear(16, 16), nn.ReLU(), linear(16, outputs, seed=8))
    heads = {f"score.{name}": x.detach() for name, x in layers.state_dict().items()}
    kind = "Qwen2ForRewardModel" if outputs == 1 else "Qwen2ForProcessRewardModel"
    return save_headed(folder, heads, architectures=[kind])


def in_a_file_of_its_own(folder: Path) -> str:
    made = save_headed(folder, {})
    save_file(named("v_head.summary", linear()), folder / "value_head.safetensors")
    return made


def normalised(folder: Path) -> str:
    return save_headed(folder, named("score", linear(bias=False)), mean=2.0, std=4.0, normalize_reward=True)


KINDS: dict[str, tuple[str, Callable[[Path], str], dict[str, Any]]] = {
    "classifier": ("reward_model", lambda folder: save_sequence_classifier(folder, pad_token_id=0), {}),
    "classifier of GPT-2": ("reward_model", lambda folder: save_sequence_classifier(folder, "gpt2"), {}),
    "one of three labels": ("reward_model", save_three, {"output": "honest"}),
    "TRL": ("reward_model", lambda folder: save_headed(folder, named("v_head.summary", linear())), {}),
    "OpenRLHF": ("reward_model", lambda folder: save_headed(folder, named("score", linear(bias=False))), {}),
    "UltraRM": ("reward_model", lambda folder: save_headed(folder, named("regression_head", linear(bias=False))), {}),
    "LLaMA-Factory": ("reward_model", in_a_file_of_its_own, {}),
    "two layers": ("reward_model", two_layers, {}),
    "mean and deviation": ("reward_model", normalised, {}),
    "tokens": ("token_reward_model", save_token_classifier, {}),
    "tokens of GPT-2": ("token_reward_model", lambda folder: save_token_classifier(folder, arch="gpt2"), {}),
    "two labels of steps": (
        "process_reward_model",
        lambda folder: save_token_classifier(folder, num_labels=2),
        {"value": "logit", "step_token": "<step>"},
    ),
    "two labels of GPT-2": (
        "token_reward_model",
        lambda folder: save_token_classifier(folder, arch="gpt2", num_labels=2),
        {"output": 1},
    ),
    "two layers, two labels": (
        "process_reward_model",
        lambda folder: two_layers(folder, outputs=2),
        {"value": "logit", "step_token": "<step>"},
    ),
    "words": (
        "process_reward_model",
        lambda folder: save_model(folder, "AutoModelForCausalLM", pad_token_id=0),
        {"good_token": "+", "bad_token": "-", "value": "log_odds", "step_token": "<step>"},
    ),
    "one word": (
        "process_reward_model",
        lambda folder: save_model(folder, "AutoModelForCausalLM", pad_token_id=0),
        {"good_token": "+", "value": "logit", "step_token": "<step>"},
    ),
}


@pytest.mark.proves("critic.separate", how="parity", tolerance="1e-5")
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_at_the_end_of_a_text_is_the_reward_models_score_of_it(kind: str, tmp_path: Path):
    name, save, settings = KINDS[kind]
    source = load_plugin("rewards", name, model=save(tmp_path), **settings)
    source.load_model(CPU)
    critic = critic_of(source)
    read = [text + settings.get("step_token", "") for text in TEXTS]
    expected = scores(source)
    assert len({round(x, 3) for x in expected}) == len(TEXTS)
    assert [value(critic, text) for text in read] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert all(p.requires_grad for p in critic.parameters())
    assert not any(p.requires_grad for p in source._loaded.model.parameters())


@pytest.mark.parametrize("kind", ["classifier", "TRL", "LLaMA-Factory", "two layers", "mean and deviation", "tokens"])
def test_a_critic_from_a_path_has_the_head_that_lies_there(kind: str, tmp_path: Path):
    name, save, settings = KINDS[kind]
    path = save(tmp_path)
    source = load_plugin("rewards", name, model=path, **settings)
    source.load_model(CPU)
    algorithm: Any = None
    critic = load_plugin("critic", "separate", init=path).build(policy(), algorithm)
    assert [value(critic, text) for text in TEXTS] == pytest.approx(scores(source), rel=1e-5, abs=1e-6)


def test_of_a_path_with_several_labels_the_trunk_is_taken_and_said_so(tmp_path: Path, caplog: Any):
    path, algorithm = save_three(tmp_path), None
    critic: Any = load_plugin("critic", "separate", init=path).build(policy(), algorithm)  # type: ignore[arg-type]
    assert torch.equal(runs.parameters(critic.trunk), runs.parameters(AutoModel.from_pretrained(path)))
    assert [value(critic, text) for text in TEXTS] == [0, 0, 0]
    assert (
        "3 labels (helpful, honest, harmless): the critic uses its trunk, with a head that starts at 0" in caplog.text
    )


def test_in_a_run_with_learning_rate_0_the_value_at_the_last_token_stays_the_score(tmp_path: Path):
    """The state before the end of sequence is that of the whole text."""
    path = runs.save_classifier(tmp_path / "rm", seed=3)
    made = runs.trainer(
        tmp_path,
        rewards=[{"use": "reward_model", "model": path}],
        advantages="gae",
        critic={"use": "separate", "init": "reward"},
        training={"learning_rate": 0.0, "max_steps": 3},
    )
    made.train()
    buffer = made.collector.collect(7)
    made.close()
    last = buffer.rows["mask"].sum(1).long() - 1
    ends = torch.tensor([ids[-1] == 1 for ids in buffer.completion_ids])
    values = buffer.rows["values"].gather(1, last.unsqueeze(1)).squeeze(1)
    assert ends.sum() > 4
    assert buffer.total_score.std() > 0.01
    torch.testing.assert_close(values[ends], buffer.total_score[ends].float(), rtol=1e-5, atol=1e-6)


def test_the_plan_says_where_scores_are_changed_before_they_are_returns():
    def said(**settings: Any) -> list[str]:
        rewards = [{"use": "reward_model", "model": "somewhere", **settings}]
        algorithm = runs.recipe(
            rewards=rewards, advantages="gae", critic={"use": "separate", "init": "reward"}
        ).algorithm()
        return list(algorithm.critic.remarks(algorithm))

    assert said() == []
    (text,) = said(weight=0.5, value="probability", normalize="std")
    assert (
        text == "it starts from the reward model's raw scores, before its weight=0.5, normalize=std, value=probability"
    )


# What cannot be a critic


def test_a_model_that_reads_both_ways_is_refused(tmp_path: Path):
    path = save_token_classifier(tmp_path, arch="bert")
    with pytest.raises(ValueError, match=r"BertForTokenClassification attends to later tokens.*critic\.init=policy"):
        load_plugin("critic", "separate", init=path).build(policy(), None)


def test_a_head_that_reads_more_than_a_hidden_state_is_refused(tmp_path: Path):
    path = save_sequence_classifier(tmp_path, "modernbert")
    with pytest.raises(
        ValueError, match=r"ModernBertForSequenceClassification (attends to later tokens|must be its head)"
    ):
        load_plugin("critic", "separate", init=path).build(policy(), None)


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"critic\.init='.*' is not a model; use policy, reward, a folder or a name"):
        load_plugin("critic", "separate", init=str(tmp_path)).build(policy(), None)


def test_a_larger_vocabulary_will_do_and_a_smaller_one_will_not(tmp_path: Path):
    for size in (300, 301, 299):
        AutoModel.from_config(configuration("llama", pad_token_id=0) if size == 300 else _sized(size)).save_pretrained(
            tmp_path / str(size)
        )
    build = lambda size: load_plugin("critic", "separate", init=str(tmp_path / str(size))).build(policy(), None)  # noqa: E731
    assert build(300).trunk.get_input_embeddings().num_embeddings == 300
    assert build(301).trunk.get_input_embeddings().num_embeddings == 301
    with pytest.raises(ValueError, match="vocabulary must cover the policy's 300 tokens, got 299"):
        build(299)


def _sized(size: int) -> Any:
    config = configuration("llama", pad_token_id=0)
    config.vocab_size = size
    return config


# Tokenizers


def with_tokenizer(folder: Path, tokenizer: Any) -> str:
    """A trunk of `tiny_policy`'s shape that was trained on other tokens."""
    tiny_policy(seed=5)[0].model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def renumbered() -> Any:
    """`tiny_policy`'s tokenizer with two letters exchanged: as many tokens, other ids."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = tiny_policy()[1]
    state = json.loads(own.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["b"], vocabulary["q"] = vocabulary["q"], vocabulary["b"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize("init", ["path", "reward", "reward with a tokenizer elsewhere"])
def test_a_critic_on_other_tokens_is_refused_with_the_first_that_differs(init: str, tmp_path: Path):
    """The vocabularies are of one size: nothing else would tell."""
    own = tiny_policy()[1].get_vocab()
    expected = rf"token 'b' is {own['b']} in the policy's and {own['q']} there\. Start the critic from a model"
    if init == "path":
        parts: dict[str, Any] = {
            "critic": {"use": "separate", "init": with_tokenizer(tmp_path / "other", renumbered())}
        }
    else:
        source = {"use": "reward_model", "model": runs.save_classifier(tmp_path / "rm")}
        if init == "reward":
            renumbered().save_pretrained(tmp_path / "rm")
        else:
            renumbered().save_pretrained(tmp_path / "tokens")
            source["tokenizer"] = str(tmp_path / "tokens")
        parts = {"rewards": [source], "critic": {"use": "separate", "init": "reward"}}
    with pytest.raises(ValueError, match=expected):
        runs.trainer(tmp_path, advantages="gae", **parts)


def test_without_a_tokenizer_there_the_sizes_are_compared_and_a_warning_says_so(tmp_path: Path, caplog: Any):
    tiny_policy(seed=5)[0].model.save_pretrained(tmp_path / "other")
    plugin = load_plugin("critic", "separate", init=str(tmp_path / "other"))
    base, tokenizer = tiny_policy()
    algorithm: Any = None
    plugin.build(base, algorithm)
    with caplog.at_level(logging.WARNING):
        plugin.setup(Context(device=CPU, tokenizer=tokenizer, policy=base))
    assert "only the vocabulary sizes were compared" in caplog.text


def test_equal_tokenizers_pass_and_tokens_that_were_only_added_to_theirs_do_not_count():
    own, other = merging_tokenizer(), merging_tokenizer()
    assert first_difference(own, other) is None
    other.add_special_tokens({"additional_special_tokens": ["<reward>"]})
    assert first_difference(own, other) is None
    assert first_difference(other, own) == f"token '<reward>' is {len(own)} in the policy's and no token there"


def test_equal_vocabularies_that_cut_text_otherwise_are_told_apart():
    """The rule that makes `12` and `ab` one token is there, or is not."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = merging_tokenizer()
    state = json.loads(own.backend_tokenizer.to_str())
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if merge != ["Ċ", "Ċ"]]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<pad>")
    assert own.get_vocab() == other.get_vocab()
    said = first_difference(own, other)
    assert said is not None
    assert "is 'ĊĊ' in the policy's and 'Ċ' there" in said


def test_of_two_unlike_tokenizers_the_token_with_the_lowest_id_is_named():
    said = first_difference(merging_tokenizer(), spaced_tokenizer())
    assert said == "token '<bos>' is 1 in the policy's and no token there"
