"""Suggestions for misspelt names: the meant one is first, and what is far away is not suggested."""

import pytest

from hf_rlhf.cli.flags import FLAGS
from hf_rlhf.config.training_arguments import argument_names
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.errors import did_you_mean, near_names


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("gpro", "grpo"),
        ("grop", "grpo"),
        ("rlooo", "rloo"),
        ("ppp", "ppo"),
        ("instructgtp", "instructgpt"),
        ("grpo-verl", "grpo@verl"),
        ("drgrpo", "dr_grpo"),
        ("reinforce++", "reinforce_plus_plus"),
    ],
)
def test_a_misspelt_recipe_has_the_meant_one_first(word, first):
    assert near_names(word, [recipe.name for recipe in get_host().recipes()])[0] == first


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("lenght", ["length"]),
        ("exact", ["exact_match"]),
        ("math", ["math_answer"]),
        ("answer_math", ["math_answer"]),
        ("func", ["function"]),
        ("NUMERIC", ["numeric"]),
        ("accuracy", []),
    ],
)
def test_a_part_of_a_name_finds_it(word, names):
    assert near_names(word, get_host().names("rewards")) == names


@pytest.mark.parametrize("flag", ["loss_type", "use_vllm", "reward_funcs", "lr", "init_kl_coef", "max_new_tokens"])
def test_no_far_fetched_flag_is_suggested(flag):
    assert did_you_mean(flag, [*FLAGS, *argument_names()]) == ""


def test_three_names_at_most_and_only_equal_ones_where_case_or_punctuation_differ():
    assert did_you_mean("step", ["stop", "stem", "steep", "steps"]) == " Did you mean 'stem', 'stop' or 'steep'?"
    assert did_you_mean("GR-PO", ["gr_po", "grpo", "gdpo"]) == " Did you mean 'gr_po'?"
    assert did_you_mean("x", ["y"]) == ""
