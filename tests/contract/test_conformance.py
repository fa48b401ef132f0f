"""The conformance kit: every registered plugin passes it, and mutants fail it with the reason and no other."""

from __future__ import annotations

import re
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import AXES, Context, Plugin
from hf_rlhf.batch import Rollouts
from hf_rlhf.testing import conformance, rollouts, scored, tiny_policy
from tests.contract.mutants import advantages, base, environments, kl, losses, metrics, models, patterns, samplers
from tests.contract.mutants.base import FACTS, Estimator, Mutant
from tests.contract.mutants.losses import HalfDetached, Loss
from tests.contract.mutants.models import OtherColumn, Reward
from tests.helpers import classifiers, every
from tests.helpers.paths import ROOT

REGISTERED = sorted(
    {point.name for point in entry_points(group="hf_rlhf") if point.dist and point.dist.name == "hf_rlhf"}
)
MODULES = (
    *(base, advantages, kl, losses, metrics),
    models,
    patterns,
    samplers,
    environments,
)
MUTANTS: list[Mutant] = [mutant for module in MODULES for mutant in module.MUTANTS]


def count_fives(rollouts: Rollouts) -> list[float]:
    return [float(text.count("5")) for text in rollouts.completions]


SETTINGS: dict[str, dict[str, Any]] = {
    "advantages.mix": {"parts": ["group_norm", {"use": "reward_to_go", "gamma": 0.9}], "weights": [0.5, 0.5]},
    "loss_terms.router_balance": {"coef": 0.1},
    "loss_terms.ptx": {"path": "{folder}/texts.txt", "max_tokens": 64},
    **every.OWN_FUNCTIONS,
    "reference.model": {"path": "{folder}"},
    "environment.tools": {"tools": ["hf_rlhf.data.calculator_task:calc"], "workers": "inline"},
    "environment.trl": {"factory": "tests.helpers.environments:Doubling"},
    "reference.with_context": {"context": "answer"},
    "rewards.function": {"function": f"{__file__}:count_fives"},
    "rewards.constraints": {"instructions": [{"id": "punctuation:no_comma"}]},
    "rewards.json_schema": {"schema": {"type": "integer"}},
    "rewards.language": {"language": "en"},
    "rewards.regex": {"pattern": "[0-9]"},
    "rewards.process_reward_model": {"model": "{folder}"},
    "rewards.reward_model": {"model": "{folder}"},
    "rewards.token_reward_model": {"model": "{folder}"},
}
"""Of plugins that cannot do without."""


def make(key: str, folder: Path) -> Plugin:
    """The plugin, set up."""
    axis, _, name = key.partition(".")
    policy, tokenizer = tiny_policy()
    if key == "rewards.reward_model":
        save_classifier(folder)
    elif key == "reference.model":
        for part in (policy, tokenizer):
            part.save_pretrained(folder)
    elif key in ("rewards.process_reward_model", "rewards.token_reward_model"):
        classifiers.save_token_classifier(folder, num_labels=2 if "process" in key else 1)
    (folder / "texts.txt").write_text("\n".join(f"{i} and {i} make {2 * i}." for i in range(12)))
    settings = {k: x.format(folder=folder) if isinstance(x, str) else x for k, x in SETTINGS.get(key, {}).items()}
    plugin: Plugin = load_plugin(axis, name, **settings)
    cpu = torch.device("cpu")
    plugin.setup(Context(device=cpu, tokenizer=tokenizer, policy=policy, seed=0, process_index=0, num_processes=1))
    return plugin


def save_classifier(folder: Path) -> None:
    from transformers import LlamaForSequenceClassification

    policy, tokenizer = tiny_policy()
    policy.config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        LlamaForSequenceClassification(policy.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ask(plugin: Plugin, **options: Any) -> dict[str, str]:
    """Title -> what is wrong, of every fact that does not hold."""
    said = {}
    for fact in conformance(plugin, **options):
        try:
            fact()
        except SkipTest:
            continue
        except Exception as error:
            said[str(fact).partition(": ")[2]] = f"{type(error).__name__}: {error}"
    return said


def test_the_built_in_plugins_are_registered():
    assert {"advantages.gae", "kl.in_loss", "filters.zero_variance"} <= set(REGISTERED)
    assert {key.partition(".")[0] for key in REGISTERED} == set(AXES)


ELSEWHERE = {
    "reference.remote": "unit/plugins/test_remote_reference.py",
    "environment.verifiers": "environments/test_verifiers.py",
    "rewards.judge": "unit/scoring/test_judge.py",
    "rewards.remote": "unit/scoring/test_remote.py",
    "rewards.unit_tests": "processes/test_unit_tests.py",
    "rollout.vllm": "unit/plugins/test_vllm.py",
    "sync.ipc": "unit/plugins/test_sync.py",
    "sync.nccl": "unit/plugins/test_sync.py",
}
"""What needs a server or rows with tests of their own conforms in a test of its own."""


def test_what_conforms_elsewhere_is_tried_there():
    for file in ELSEWHERE.values():
        assert "conformance(" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("key", [key for key in REGISTERED if key not in ELSEWHERE])
def test_every_registered_plugin_conforms_in_less_than_five_seconds(key: str, tmp_path: Path):
    if key == "reference.adapter_off":
        pytest.importorskip("peft")
    plugin = make(key, tmp_path)
    started = time.process_time()
    try:
        facts = conformance(plugin)
        assert len(facts) >= 6
        for fact in facts:
            fact()
    finally:
        plugin.close()
    assert time.process_time() - started < 5


OTHER_SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    *(
        ("kl", name, {"level": "sequence", "estimator": "k2"})
        for name in ("in_reward", "in_loss", "in_advantage", "monitor")
    ),
    *(("kl", "in_loss", {"estimator": estimator}) for estimator in ("abs", "exact", "k1_is", "k3_is", "k3_plus")),
    ("kl", "in_reward", {"controller": "adaptive", "clamp": 0.1}),
    ("advantages", "gae", {"gamma": 0.9, "lam": 0.5}),
    ("advantages", "gae", {"whiten": True}),
    ("advantages", "reward_to_go", {"gamma": 0.9}),
    ("advantages", "reinforce", {"gamma": 0.9}),
    *(
        ("advantages", "baseline", {"baseline": name})
        for name in ("constant", "critic", "ema", "greedy", "others_mean")
    ),
    ("advantages", "mix", {"parts": ["group_norm", "reinforce_plus_plus"], "weights": [1.0, 1.0]}),
]


@pytest.mark.parametrize(("axis", "name", "settings"), OTHER_SETTINGS, ids=str)
def test_other_settings_conform(axis: str, name: str, settings: dict[str, Any]):
    assert ask(load_plugin(axis, name, **settings)) == {}


# Mutants


def title(mutant: Mutant) -> str:
    return type(mutant.make()).__name__


@pytest.mark.parametrize("mutant", MUTANTS, ids=title)
def test_a_mutant_is_caught_by_its_fact_and_by_no_other(mutant: Mutant):
    said = ask(mutant.make())
    fact = FACTS[mutant.fact]
    assert re.search(mutant.says, said.get(fact, "")), said
    assert set(said) == {fact, *(FACTS[name] for name in mutant.also)}, said


def test_every_fact_has_a_mutant_that_it_catches():
    caught = {name for mutant in MUTANTS for name in (mutant.fact, *mutant.also)}
    assert caught == set(FACTS)
    known = {str(fact).partition(": ")[2] for mutant in MUTANTS for fact in conformance(mutant.make())}
    assert set(FACTS.values()) == known


def test_many_mutants_are_bugs_that_a_public_system_had():
    threads = [mutant for mutant in MUTANTS if re.search(r"\([\w.-]+/[\w.-]+#\d+", type(mutant.make()).__doc__ or "")]
    assert len(threads) >= 20


def test_a_right_plugin_has_nothing_to_answer_for():
    right = [Estimator(), Loss(), Reward(), models.Verifier(), models.Noise()]
    right += [models.OwnCritic(), advantages.Keep(), kl.Controller()]
    right += [patterns.Flat(), samplers.Recent(), environments.Guess()]
    right += [losses.Weights(), losses.Correction(), losses.Term()]
    right.append(kl.Placement(estimator=kl.k2()))
    assert [(type(plugin).__name__, ask(plugin)) for plugin in right if ask(plugin)] == []


# What else the kit takes and says


class Meant(HalfDetached):
    """Says so in its body."""

    stops_gradient = True


def test_a_stopped_gradient_can_be_meant():
    assert ask(Meant()) == {}
    assert ask(HalfDetached(), finite_differences=False) == {}
    assert set(ask(Meant(), finite_differences=True)) == {FACTS["differences"]}


def test_facts_read_as_sentences():
    titles = [str(fact) for fact in conformance(Estimator())]
    assert "advantages.wrong: padding columns change nothing" in titles
    assert len(titles) == len(set(titles))


def test_what_fails_on_ordinary_input_is_said_once():
    facts = {str(fact).partition(": ")[2]: fact for fact in conformance(losses.Bare())}
    with pytest.raises(AssertionError, match="a pair"):
        facts[FACTS["shape"]]()
    for name in ("padding", "split", "climbs"):
        with pytest.raises(SkipTest, match="skipped: "):
            facts[FACTS[name]]()


def test_a_reward_with_columns_of_its_own_conforms_on_rollouts_that_have_them():
    own = rollouts(columns={"solution": [1.0, None, 0.5, 0.0]})
    assert ask(OtherColumn(), rollouts=own) == {}


def test_the_columns_that_a_reward_names_are_there():
    class Reading(models.Verifier):
        """1 where completion and solution are one."""

        def columns(self) -> set[str]:
            return {"solution"}

        def __call__(self, rollouts: Rollouts) -> Any:
            return [None if x is None else float(x == "5") for x in rollouts.column("solution")]

    assert set(ask(Reading())) <= {FACTS["copies"]}, "a class inside a function cannot be pickled"


def test_an_engine_with_columns_of_its_own_conforms_on_prompts_that_have_them():
    from hf_rlhf.batch import Prompt

    prompts = [Prompt(ids=[5], prompt="#", columns={"tries": [[7, 8, 1], [9, 1]]})]
    engine = load_plugin("rollout", "scripted", column="tries")
    assert ask(engine, prompts=prompts) == {}
    assert "at least 2 completions per row" in ask(engine)[FACTS["completions"]], "a text stands in each column"


def test_what_is_no_plugin_is_refused():
    with pytest.raises(TypeError, match="str is not a plugin"):
        conformance("group_norm")  # type: ignore[arg-type]


# Test doubles


def test_scored_has_groups_of_each_size_and_tool_tokens_between():
    batch = scored(group_sizes=(2, 1, 3), length=6)
    assert batch.group_size().tolist() == [2, 2, 1, 3, 3, 3]
    ends = batch.mask.shape[1] - batch.mask.flip(1).argmax(1)
    assert (batch.mask.sum(1) > 0).all()
    assert (batch.mask.sum(1) < ends).any()
    assert torch.equal(scored(seed=3).token_rewards, scored(seed=3).token_rewards)
    assert scored(values=None).values is None


def test_scored_has_every_field_and_they_agree():
    batch = scored()
    assert all(value is not None for value in vars(batch).values())
    assert torch.allclose(batch.totals(), (batch.token_rewards + batch.kl_penalties).sum(1))
    assert torch.allclose(scored(scores=None).totals(), batch.totals())
    assert ((batch.token_rewards == 0) | (batch.mask > 0)).all()
    assert (batch.group_std(batch.greedy) == 0).all()
    assert (batch.sum_sq_probs >= batch.old_logps.exp() ** 2).all()
    assert (batch.sum_sq_probs <= 1).all()


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
