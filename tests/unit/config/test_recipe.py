"""Recipes: their YAML, overrides, defaults, every problem at once, and the ones that are shipped."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf import load_plugin, load_recipe
from hf_rlhf.config.overrides import apply_overrides, value_at
from hf_rlhf.config.recipe import read_recipe, resolve
from hf_rlhf.config.recipe_yaml import KEYS, RecipeError, read_yaml, write_yaml
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.registry.host import Host, get_host, use_host
from hf_rlhf.registry.settings_schema import describe
from hf_rlhf.runtime.errors import UserError
from tests.helpers.paths import ROOT

SHIPPED = ["dr_grpo", "grpo", "ppo", "reinforce", "rloo", "rlvr"]

SMALL = """
rollout: {use: generate, prompts: 4}
rewards: [{use: exact_match}]
kl: [{use: in_loss, beta: 0.04, estimator: {use: k3}}]
advantages: {use: group_norm, eps: 1e-3}
"""

NESTING = '''
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen
from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, choice


@dataclass(kw_only=True)
class Parts:
    """A group of settings."""

    size: int = 3
    """A number."""


@dataclass(kw_only=True)
class Mix(AdvantageEstimator):
    """A weighted sum of estimators."""

    name = "blend"

    parts: list[AdvantageEstimator]
    """What is summed."""
    weights: Annotated[list[float], MinLen(1)] = field(default_factory=lambda: [1.0])
    """Factors."""
    baseline: AdvantageEstimator | None = None
    """Subtracted where there is one."""
    first: AdvantageEstimator = choice("group_norm")
    """Added."""
    mode: Literal["sum", "mean"] = "sum"
    """How."""
    file: Path | None = None
    """A path."""
    group: Parts = field(default_factory=Parts)
    """More."""

    def __post_init__(self):
        if len(self.weights) != len(self.parts):
            raise ValueError(f"{len(self.parts)} parts need as many weights, not {len(self.weights)}")

    def __call__(self, scored):
        return sum(w * part(scored) for w, part in zip(self.weights, self.parts))


@hookimpl
def advantages():
    return [Mix]
'''


def small(text: str = "") -> dict:
    return read_yaml(SMALL + text, "small.yaml")


def problems(raw) -> dict[str, str]:
    with pytest.raises(RecipeError) as error:
        resolve(raw)
    return dict(error.value.problems)


@pytest.fixture
def nesting_host(tmp_path):
    file = tmp_path / "blend.py"
    file.write_text(NESTING)
    host = Host(disable="")
    host.add_file(file)
    with use_host(host):
        yield host


# YAML


def test_numbers_are_read_as_anyone_would():
    text = "{a: 1e-6, b: 1.0e-6, c: .5, d: -3, e: 1E3, f: 007, g: 0.2, h: 1:30, i: 2024-01-01, j: on, k: true, l: ~}"
    assert read_yaml(text, "x") == {
        "a": 1e-6,
        "b": 1e-6,
        "c": 0.5,
        "d": -3,
        "e": 1000.0,
        "f": "007",
        "g": 0.2,
        "h": "1:30",
        "i": "2024-01-01",
        "j": "on",
        "k": True,
        "l": None,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl: []\nkl: []", "r.yaml, line 2, column 1: the key 'kl' occurs twice"),
        ("kl: [{use: a, use: b}]", "the key 'use' occurs twice"),
        ("kl: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor for the tag"),
        ("kl: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("a: &x 1\nb: *x", "must not have anchors or aliases"),
        ("a: &x [*x]", "must not have anchors or aliases"),
        ("1: a", "the key 1 must be text"),
        ("kl: [", "r.yaml, line 1"),
        ("a: \x00", "r.yaml"),
    ],
)
def test_yaml_that_is_more_than_plain_data_is_refused_with_its_place(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        read_yaml(text, "r.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("line", "quoted"),
    [
        ("system: Answer: {x}", "system: 'Answer: {x}'"),
        ("system: a: b: c", "system: 'a: b: c'"),
        ("system: {x} is it", "system: '{x} is it'"),
        ("system: it's: [1", "system: 'it''s: [1'"),
        ("system: 'it's'", "system: 'it''s'"),
        ('system: "\\d+"', "system: '\\d+'"),
        ('system: "open', "system: 'open'"),
        *(
            (f"system: {text}", f"system: '{text}'")
            for text in ("[1, 2", "@foo", "%x", "*a", "&a b", "!t b", "`x`", "> x")
        ),
    ],
)
def test_a_yaml_error_shows_its_line_and_what_to_quote(line, quoted):
    text = f"kl: []\ndataset:\n  {line}\n  split: train\n"
    with pytest.raises(UserError) as refused:
        read_yaml(text, "r.yaml")
    place, shown, pointer, advice = str(refused.value).split("\n")
    assert place.startswith("r.yaml, line 3, column ")
    assert shown.strip() == line
    assert 0 < pointer.index("^") <= len(shown)
    assert advice == f"If it is text, quote it: {quoted}"
    assert read_yaml(text.replace(line, quoted), "r.yaml")["dataset"]["split"] == "train"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("kl: {use: a: b}", "Text needs quotes if it contains ': '"),
        ("kl: [{use: a, beta: 1\nrewards: []", "brackets and quotes must be closed"),
        ("a:\n\tb: 1", "Indent with spaces"),
        ("a:\n  b: 1\n c: 2", "must begin in the same column"),
        ("kl: []\nkl: []", "\n    kl: []\n    ^"),
        ("a: b\x00c", "the character '\\x00' is not allowed\n    a: b c\n        ^"),
    ],
)
def test_other_yaml_errors_say_what_to_mend(text, fix):
    with pytest.raises(UserError, match=re.escape(fix)):
        read_yaml(text, "r.yaml")


plain_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
    | st.sampled_from(["1e-6", "1e6", ".5", "yes", "null", "~", "1:30", "2024-01-01", "007", "<<", "=", "a: b", "*x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1e-6.", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(data=plain_data)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_what_is_written_is_read_back(data):
    assert read_yaml(write_yaml(data), "x") == data


# Resolving


def test_a_recipe_becomes_plugins_sections_and_the_whole_of_itself():
    recipe = resolve(small("update: {epochs: '2'}"))
    assert recipe.plugins["advantages"].eps == 1e-3
    assert recipe.plugins["kl"][0].estimator.name == "k3"
    assert recipe.update.epochs == 2
    assert recipe.sections["update"] is recipe.update
    assert list(recipe.raw) == [key for key in KEYS if key != "trainer"]
    assert recipe.raw["rollout"]["num_generations"] == 8
    assert recipe.raw["model"]["lora"] is None
    again = resolve(read_yaml(recipe.dump(), "dump"))
    assert again.raw == recipe.raw
    assert again.plugins == recipe.plugins
    assert again.sections == recipe.sections


def test_a_plugin_may_be_just_a_name_and_a_list_just_one_plugin():
    raw = small()
    raw |= {"advantages": "leave_one_out", "rewards": "exact_match"}
    raw["kl"] = {"use": "in_loss", "estimator": "k2"}
    recipe = resolve(raw)
    assert recipe.raw["advantages"]["use"] == "leave_one_out"
    assert [source["use"] for source in recipe.raw["rewards"]] == ["exact_match"]
    assert recipe.plugins["kl"][0].estimator.name == "k2"


def test_axes_left_out_have_defaults():
    raw = small()
    del raw["kl"]
    plugins = resolve(raw).plugins
    names = {axis: plugin.name for axis, plugin in plugins.items() if not isinstance(plugin, list)}
    assert names == {
        "sampler": "shuffled",
        "rollout": "generate",
        "advantages": "group_norm",
        "critic": "none",
        "policy_loss": "ppo_clip",
        "rollout_correction": "none",
        "reference": "none",
        "optimizer": "trainer",
        "aggregation": "token_mean",
    }
    assert [plugins[axis] for axis in ["kl", "loss_terms", "filters"]] == [[], [], []]


@pytest.mark.parametrize(
    ("more", "reference"),
    [
        ("", "frozen"),
        ("model: {lora: {r: 4}}", "adapter_off"),
        ("model: {lora: null}", "frozen"),
        ("reference: none", "none"),
    ],
)
def test_the_reference_left_out_is_what_the_kl_needs(more, reference):
    assert resolve(small(more)).raw["reference"]["use"] == reference


def test_rollout_and_advantages_must_be_chosen():
    found = problems({})
    assert set(found) == {"rollout", "advantages"}
    assert "write `advantages: {use: NAME}`. There are: baseline, function, gae, gdpo" in found["advantages"]


def test_all_problems_are_told_at_once_with_path_choices_and_fix():
    raw = small() | {
        "kl_estimator": "k1",
        "env": {"LD_PRELOAD": "evil.so"},
        "advantage": {"use": "gae"},
        "advantages": {"use": "group_nrom"},
        "policy_loss": {"use": "ppo_clip", "epsilon_lo": 0.1, "epsilon_high": -1},
        "kl": [{"use": "in_loss", "estimator": {"use": "k4"}, "level": "tokn", "beta": "many"}],
        "update": {"epochs": 0, "mini_batches": True},
        "model": {"path": {"a": 1}, "lora": {"rank": 1}},
        "filters": 3,
        "critic": None,
        "training": {"learnin_rate": 1, "learning_rate": math.nan, "max_steps": "ten"},
    }
    found = problems(raw)
    assert found == {
        "kl_estimator": "a kl_estimator is a setting of another plugin: `kl: [{use: in_loss, estimator: k3}]`",
        "env": f"a recipe has no such key. It has: {', '.join(KEYS)}",
        "advantage": f"a recipe has no such key. Did you mean 'advantages'? It has: {', '.join(KEYS)}",
        "advantages": "no advantages plugin named 'group_nrom'. Did you mean 'group_norm'? There are: "
        + ", ".join(get_host().names("advantages")),
        "policy_loss.epsilon_lo": "policy_loss=ppo_clip has no such setting. Did you mean 'epsilon_low'? "
        "It has: epsilon_low, epsilon_high",
        "policy_loss.epsilon_high": "got -1; takes number > 0 (default 0.2)",
        "kl.0.estimator": "no kl_estimator plugin named 'k4'. There are: "
        + ", ".join(get_host().names("kl_estimator")),
        "kl.0.level": "got 'tokn'; takes one of 'token', 'sequence' (default 'token'). Did you mean 'token'?",
        "kl.0.beta": "got 'many'; takes number >= 0 (default 0.04)",
        "update.epochs": "got 0; takes whole number >= 1 (default 1)",
        "update.mini_batches": "got true; takes whole number >= 1 (default 1)",
        "model.path": "got {'a': 1}; takes text or null (default null). Text with ': ', '[' or '{' needs quotes",
        "model.lora.rank": "model.lora has no such setting. It is a setting of another library; the same here:\n"
        "    OpenRLHF: ds.lora.rank, ds.lora.alpha, ds.lora.dropout, ds.lora.target_modules -> "
        "model.lora={r: 64, alpha: 64, dropout: 0.0, target_modules: all-linear}\n  It has: r, alpha, dropout, "
        "target_modules, target_parameters, modules_to_save, trainable_token_indices, use_dora, use_rslora",
        "filters": "takes a list, `[]` for none and `{use: NAME}` for one; got 3",
        "critic": "takes `{use: NAME, ...}` or just a name; got null. There are: none, separate, value_head",
        "training.learnin_rate": "transformers.TrainingArguments has no such setting. Did you mean 'learning_rate'?",
        "training.learning_rate": "got nan; takes number (default 5e-05)",
        "training.max_steps": "got 'ten'; takes whole number (default -1)",
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kl.0.beta", "-0.5"),
        ("kl.0.beta", ".nan"),
        ("kl.0.beta", ".inf"),
        ("policy_loss.epsilon_low", "-1"),
        ("rewards.0.weight", ".nan"),
        ("rollout.temperature", "0"),
        ("update.epochs", "0"),
        ("update.epochs", "1.5"),
        ("dataset.column", "x"),
        ("dataset.prompt", "3"),
        ("evaluation.temperature", "-1"),
    ],
)
def test_nonsense_is_refused_where_others_train_on_it(path, value):
    raw, _ = apply_overrides(small(), [f"{path}={value}"])
    assert list(problems(raw)) == [path]


def test_training_keeps_what_is_written_and_reads_numbers_in_text():
    raw = small('training: {learning_rate: "1e-5", optim: sgd, lr_scheduler_kwargs: {num_cycles: 2}, bf16: false}')
    training = resolve(raw).training
    kept = {"learning_rate": 1e-5, "optim": "sgd", "lr_scheduler_kwargs": {"num_cycles": 2}, "bf16": False}
    assert training == kept


def test_nested_plugins_lists_of_them_and_groups_are_read_and_written_back(nesting_host):
    raw = small()
    raw["advantages"] = read_yaml(
        """
        use: blend
        parts: [gae, {use: group_norm, eps: 0.5}, {use: blend, parts: [reinforce], mode: mean}]
        weights: [1, 2, "3"]
        baseline: {use: reward_to_go, gamma: 0.5}
        first: {eps: 0.25}
        file: a/b
        group: {size: 4}
        """,
        "x",
    )
    recipe = resolve(raw)
    mix = recipe.plugins["advantages"]
    assert [part.name for part in mix.parts] == ["gae", "group_norm", "blend"]
    assert (mix.parts[1].eps, mix.baseline.gamma, mix.first.name, mix.first.eps) == (0.5, 0.5, "group_norm", 0.25)
    assert (mix.weights, mix.file, mix.group.size, mix.parts[2].baseline) == ([1.0, 2.0, 3.0], Path("a/b"), 4, None)
    again = resolve(read_yaml(recipe.dump(), "dump"))
    assert again.raw == recipe.raw
    assert again.plugins == recipe.plugins


def test_problems_inside_nested_plugins_have_their_whole_path(nesting_host):
    raw = small()
    part = {"use": "blend", "parts": [], "weights": []}
    raw["advantages"] = {"use": "blend", "parts": [{"use": "gae", "lam": 2}, part], "group": {"size": "x"}, "first": 3}
    found = problems(raw)
    assert set(found) == {f"advantages.{path}" for path in ["parts.0.lam", "parts.1.weights", "group.size", "first"]}
    assert "with length >= 1" in found["advantages.parts.1.weights"]
    raw["advantages"] = {"use": "blend", "parts": ["gae"], "weights": [1, 2]}
    assert problems(raw) == {"advantages": "1 parts need as many weights, not 2"}
    raw["advantages"] = {"use": "blend"}
    assert problems(raw) == {"advantages.parts": "advantages=blend needs it; it takes list of advantages plugins"}


def test_a_qualified_name_stays_qualified():
    raw = small() | {"advantages": {"use": "hf_rlhf/gae"}}
    assert resolve(raw).raw["advantages"]["use"] == "hf_rlhf/gae"


def test_every_setting_of_a_section_is_described():
    for cls in SECTIONS.values():
        assert all(setting.doc for setting in describe(cls))
    assert describe(SECTIONS["update"])[0][:3] == ("mini_batches", "whole number >= 1", "1")


# load_plugin


def test_load_plugin_checks_settings_and_fills_nested_plugins():
    assert load_plugin("kl", "in_loss").estimator.name == "k3"
    assert load_plugin("kl", "in_loss", beta="1e-2").beta == 0.01
    own = load_plugin("kl_estimator", "k2")
    for estimator in ["k2", {"use": "k2"}, own]:
        assert load_plugin("kl", "in_loss", estimator=estimator).estimator == own
    with pytest.raises(RecipeError) as error:
        load_plugin("kl", "in_loss", beta=-1, estimater="k2")
    assert [path for path, _ in error.value.problems] == ["kl.estimater", "kl.beta"]
    with pytest.raises(RecipeError, match="takes a plugin of the axis kl_estimator"):
        load_plugin("kl", "in_loss", estimator=load_plugin("advantages", "gae"))
    with pytest.raises(UserError, match="no kl plugin named 'in_los'"):
        load_plugin("kl", "in_los")


# Overrides


def test_overrides_set_append_and_clear():
    raw, notes = apply_overrides(
        small(),
        ["kl.0.beta=0.1", "rewards.1={use: length, weight: 0.5}", "update.epochs=2", "policy_loss.epsilon_high=0.28"],
    )
    recipe = resolve(raw)
    assert (recipe.plugins["kl"][0].beta, recipe.update.epochs, notes) == (0.1, 2, [])
    assert [reward.name for reward in recipe.plugins["rewards"]] == ["exact_match", "length"]
    assert (recipe.plugins["policy_loss"].name, recipe.plugins["policy_loss"].epsilon_high) == ("ppo_clip", 0.28)
    raw, _ = apply_overrides(raw, ["kl=[]", "rewards.2.use=format", "training.lr_scheduler_kwargs.num_cycles=2"])
    assert raw["kl"] == []
    assert raw["rewards"][2] == {"use": "format"}
    assert raw["training"] == {"lr_scheduler_kwargs": {"num_cycles": 2}}


TEXTS = (
    "Answer: {x}",
    "a: b: c",
    "@foo",
    "[1, 2",
    "%x",
    "*a",
    "&a",
    "`a`",
    "- a",
    "[a, b]",
    "# x",
    "a # b",
    " ",
    "---",
    "'tis",
)
TEXTS += ("'a' or 'b'", "a\nb", "!x", "{a: 1}", "x:", "😀", "a\\n")


@pytest.mark.parametrize("key", ["dataset.system", "model.path", "rewards.0.label", "training.run_name"])
def test_a_value_of_a_setting_that_takes_text_is_text_as_written(key):
    for text in TEXTS:
        raw, _ = apply_overrides(small(), ["rewards.0.use=exact_match", f"{key}={text}"])
        assert value_at(raw, key.split(".")) == text
    resolve(raw)


@pytest.mark.parametrize(
    ("text", "value"), [("null", None), ("", None), ("'a: b'", "a: b"), ('"a\\tb"', "a\tb"), ("|\n a\n b", "a\nb")]
)
def test_null_and_quoted_text_are_yaml_where_text_is_taken(text, value):
    assert apply_overrides(small(), [f"dataset.system={text}"])[0]["dataset"]["system"] == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temperature=@foo", "rollout.temperature: got '@foo'; takes number > 0"),
        ("rollout.temperature=[1, 2", "rollout.temperature: got '[1, 2'; takes number > 0; the value, line 1"),
        ("dataset.held_out=`x`", "dataset.held_out: got '`x`'; takes whole number >= 0"),
        ("training.max_steps=*x", "training.max_steps: got '*x'; takes whole number"),
        ("kl=@x", "kl.0: no kl plugin named '@x'"),
        ("kl=[{use: a", "kl: the value, line 1"),
        ("advantages=@x", "no advantages plugin named '@x'"),
    ],
)
def test_a_value_that_is_not_yaml_is_refused_with_what_the_setting_takes(override, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        resolve(apply_overrides(small(), [override])[0])


def test_values_that_are_given_as_data_are_not_parsed():
    raw, _ = apply_overrides(small(), [("dataset.system", "'a'"), ("training.seed", 3)])
    assert (raw["dataset"]["system"], raw["training"]["seed"]) == ("'a'", 3)


def test_overrides_leave_the_recipe_they_are_applied_to():
    raw = small()
    apply_overrides(raw, ["kl.0.beta=9", "advantages=gae"])
    assert raw == small()


@pytest.mark.parametrize("override", ["advantages.use=leave_one_out", "advantages=leave_one_out"])
def test_another_plugin_drops_the_settings_it_does_not_have_and_says_so(override):
    raw, notes = apply_overrides(small(), [override])
    assert raw["advantages"] == {"use": "leave_one_out"}
    assert notes == ["advantages.eps=0.001 dropped: leave_one_out has no eps"]


def test_another_plugin_keeps_the_settings_that_it_shares():
    raw, notes = apply_overrides(small(), ["kl.0.use=in_reward"])
    assert raw["kl"] == [{"use": "in_reward", "beta": 0.04, "estimator": {"use": "k3"}}]
    assert notes == []
    raw, _ = apply_overrides(small(), ["rollout={use: scripted, prompts: 2}"])
    assert raw["rollout"] == {"use": "scripted", "prompts": 2}


def test_what_an_override_sets_is_never_dropped():
    raw, notes = apply_overrides(small(), ["advantages.lam=0.9", "advantages.eps=1", "advantages.use=gae"])
    assert raw["advantages"] == {"use": "gae", "eps": 1, "lam": 0.9}
    assert notes == []
    assert list(problems(raw)) == ["advantages.eps"]


def test_nested_plugins_can_be_overridden(nesting_host):
    raw, _ = apply_overrides(small(), ["kl.0.estimator=k2"])
    assert resolve(raw).plugins["kl"][0].estimator.name == "k2"
    raw = small() | {"advantages": {"use": "blend", "parts": ["group_norm"]}}
    overrides = ["advantages.parts.0.eps=2", "advantages.parts.0.use=gae", "advantages.parts.0.lam=0.5"]
    raw, notes = apply_overrides(raw, [*overrides[:1], "advantages.first.eps=3", "advantages.first=gae"])
    assert raw["advantages"]["parts"] == [{"use": "group_norm", "eps": 2}]
    assert raw["advantages"]["first"] == {"use": "gae", "eps": 3}
    raw, notes = apply_overrides(raw, overrides[1:])
    assert raw["advantages"]["parts"] == [{"use": "gae", "lam": 0.5}]
    assert notes == ["advantages.parts.0.eps=2 dropped: gae has no eps"]


def test_overrides_that_lead_nowhere_are_told_all_at_once():
    overrides = ["advantage.use=gae", "kl.3.beta=1", "kl.x=1", "update.epochs.x=1", "word", "rewards.0.weight=[a"]
    with pytest.raises(RecipeError) as error:
        apply_overrides(small("update: {epochs: 1}"), overrides)
    found = dict(error.value.problems)
    assert list(found) == [override.split("=")[0] for override in overrides]
    assert "Did you mean 'advantages'?" in found["advantage.use"]
    assert found["kl.3.beta"] == "kl is a list: write kl.0, or kl.1 to append"
    assert found["update.epochs.x"] == "update.epochs is 1, which has no settings"
    assert "write KEY=VALUE" in found["word"]


def test_a_misspelt_setting_in_an_override_gets_the_nearest():
    raw, _ = apply_overrides(small(), ["advantages.epz=1"])
    assert problems(raw)["advantages.epz"].startswith("advantages=group_norm has no such setting. Did you mean 'eps'?")


# Shipped recipes


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_short_names_its_source_and_makes_an_algorithm(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert len(text.splitlines()) < 60
    assert re.match(r"# .*(arXiv:\d{4}\.\d{5}|Williams)", text)
    recipe = load_recipe(name)
    assert recipe.algorithm().problems() == []
    assert resolve(read_yaml(recipe.dump(), "dump")).raw == recipe.raw
    assert set(read_recipe(name)) <= set(recipe.raw)


def test_only_ppo_has_a_critic_and_only_kl_brings_a_reference():
    recipes = {name: load_recipe(name).plugins for name in SHIPPED}
    assert [name for name, plugins in recipes.items() if plugins["critic"].name != "none"] == ["ppo"]
    references = [name for name, plugins in recipes.items() if plugins["reference"].name != "none"]
    assert references == [name for name, plugins in recipes.items() if plugins["kl"]] == ["grpo", "ppo", "rloo"]


def test_a_recipe_may_be_a_name_a_qualified_name_or_a_path(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text(SMALL)
    assert load_recipe(path).name == "own"
    assert load_recipe(str(path), ["advantages=gae"]).notes == ["advantages.eps=0.001 dropped: gae has no eps"]
    assert load_recipe("hf_rlhf/grpo").raw == load_recipe("grpo").raw
    with pytest.raises(UserError, match=r"no recipe named 'gprpo'\. Did you mean 'grpo'"):
        load_recipe("gprpo")
    with pytest.raises(UserError, match="there is no recipe file"):
        load_recipe(tmp_path / "gone.yaml")
    path.write_text("- a list")
    with pytest.raises(UserError, match="a recipe must be a mapping"):
        load_recipe(path)
