"""What a careless setting, model or engine must not do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainingArguments

from hf_rlhf.axes import RolloutEngine
from hf_rlhf.batch import Completions
from hf_rlhf.config.training_arguments import ArgumentError, check_arguments
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import load_model
from hf_rlhf.scoring.scorer import RewardError
from tests.helpers.runs import FORMAT, SAMPLED, problems, trained, trainer


def test_the_models_own_generation_settings_do_not_change_what_is_sampled(tmp_path):
    made = trainer(tmp_path, rollout=SAMPLED)
    engine, policy, prompts = made.algorithm.rollout, made.collector.policy, made.stream.next(4)

    def sample() -> list[list[int]]:
        torch.manual_seed(0)
        return engine(policy, prompts, 4).ids

    plain = sample()
    policy.model.generation_config.suppress_tokens = sorted({token for row in plain for token in row})[:20]
    policy.model.generation_config.no_repeat_ngram_size = 1
    assert sample() == plain
    assert policy.model.generation_config.no_repeat_ngram_size == 1


def test_a_critic_from_a_path_has_no_dropout(tmp_path):
    vocabulary = trainer(tmp_path / "a").model.config.vocab_size
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, num_labels=1)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "critic")
    critic = {"use": "separate", "init": str(tmp_path / "critic")}
    made = trainer(tmp_path / "b", advantages="gae", critic=critic)
    probabilities = [m.p for m in made.actor_critic.critic.modules() if isinstance(m, torch.nn.Dropout)]
    assert probabilities
    assert set(probabilities) == {0.0}


@pytest.mark.parametrize("what", ["masks", "logps"])
def test_an_engine_whose_rows_do_not_fit_its_tokens_is_named(what, tmp_path):
    @dataclass(kw_only=True)
    class Careless(RolloutEngine):
        """Gives one number too few."""

        name = "careless"

        def __call__(self, policy: Any, prompts: Any, num_generations: int, *, temperature: Any = None) -> Completions:
            rows = len(prompts) * num_generations
            short = {what: [[1] * 2] * rows}
            return Completions(ids=[[40, 41, 42]] * rows, finish_reasons=["stop"] * rows, **short)

    made = trainer(tmp_path)
    made.algorithm.rollout = Careless(prompts=4, num_generations=4)
    with pytest.raises(
        ValueError, match=f"careless must return one of {what} per token, .*: row 0 has 3 tokens, got 2"
    ):
        made.train()


def test_a_run_in_which_nothing_is_scored_ends_with_the_reason(tmp_path, caplog):
    silent = {"use": "function", "function": lambda completions: [None] * len(completions), "label": "silent"}
    with pytest.raises(RewardError, match="no completion was scored in 3 consecutive rounds of prompts: silent"):
        trained(tmp_path, rewards=[silent], training={"max_steps": 20})
    assert "no reward source scored any of 16 completions" in caplog.text


def test_a_reward_that_exits_is_an_error_with_its_place(tmp_path):
    def leaves(completions: list[str]) -> list[float]:
        raise SystemExit(0)

    with pytest.raises(RewardError, match=r"(?s)raised SystemExit.*test_robustness\.py:\d+"):
        trained(tmp_path, rewards=[{"use": "function", "function": leaves}])


def test_a_partial_can_be_a_reward(tmp_path):
    def count(completions: list[str], letter: str) -> list[float]:
        return [float(text.count(letter)) for text in completions]

    reward = {"use": "function", "function": partial(count, letter="1"), "label": "ones"}
    made = trained(tmp_path, rewards=[reward])
    assert "reward/ones/mean" in made.state.log_history[0]


def test_what_a_lora_run_saved_loads_as_a_model_that_learns(tmp_path):
    first = trained(tmp_path / "a", lora=True)
    first.model.get_base_model().config.name_or_path = str(tmp_path / "base")
    first.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    base = trainer(tmp_path / "b").model
    base.save_pretrained(tmp_path / "base")
    first.save_model(str(tmp_path / "adapter"))
    loaded = load_model(Model(path=str(tmp_path / "adapter")))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        expected = first.model.eval()(ids).logits
        assert (loaded.eval()(ids).logits - expected).abs().max() < 1e-5
        assert (base.eval()(ids).logits - expected).abs().max() > 0


def test_processes_that_would_not_meet_are_refused(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="started 2 processes"):
        check_arguments(args)


def test_the_best_model_needs_a_metric_that_evaluation_has(tmp_path):
    with pytest.raises(ArgumentError, match="metric_for_best_model"):
        trainer(
            tmp_path,
            eval_data=problems(2),
            training={
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_strategy": "steps",
            }
            | {"save_steps": 2},
        )


def test_an_optimizer_that_leaves_the_critic_out_is_refused(tmp_path):
    made = trainer(tmp_path, advantages="gae", critic="value_head", rewards=[FORMAT])
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must hold the critic's parameters"):
        made.train()
