"""Tools in episodes of conversations: schemas in the prompt, calls read, results with mask 0; templates that do not suit."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.training.environments.rollout import Players
from hf_rlhf.training.environments.template_checks import template_problems, tool_tokens
from tests.helpers.environments import Doubling, Says
from tests.helpers.episodes import episode_tokenizer, user
from tests.helpers.runs import recipe


def double(x: int) -> int:
    """Double a number.

    Args:
        x: The number.
    """
    return 2 * x


def played(template, *texts, **settings):
    """One episode of a conversation in which the policy says these texts, each with its end token."""
    tokenizer = episode_tokenizer(template)
    policy = Policy(
        model=SimpleNamespace(config=None), tokenizer=tokenizer, device=torch.device("cpu"), wants_logps=True
    )
    environment = load_plugin("environment", "tools", tools=[double], workers="inline", answer="answer", **settings)
    engine = Says(texts=texts, max_new_tokens=128)
    algorithm = dataclasses.replace(recipe(rollout=engine).algorithm(), environment=[environment])
    ids = tokenizer.apply_chat_template([user("Twice 3?")], add_generation_prompt=True, return_dict=False)
    prompt = Prompt(ids=ids, prompt=[user("Twice 3?")], columns={"answer": "6"})
    players = Players(algorithm=algorithm, policy=policy, autocast=contextlib.nullcontext)
    return players([prompt], [0], 1, None, (0,), (0,)), tokenizer, engine


@pytest.mark.proves("environment.tools", how="parity", tolerance="0")
def test_an_episode_is_the_conversation_as_the_template_renders_it():
    call = '<tool_call>\n{"name": "double", "arguments": {"x": 3}}\n</tool_call>'
    found, tokenizer, engine = played("qwen2_5", call, "6")
    made = found.completions
    whole = tokenizer.apply_chat_template(found.messages[0], tools=[double], tokenize=False)
    assert tokenizer.decode(found.prompt_ids[0] + made.ids[0]) + "\n" == whole
    assert '"name": "double"' in tokenizer.decode(found.prompt_ids[0]), "the template shows the tool"
    sampled = [token for token, mask in zip(made.ids[0], made.masks[0], strict=True) if mask]
    assert tokenizer.decode(sampled) == f"{call}<|im_end|>6<|im_end|>"
    assert made.columns["episode/reward"] == [1.0]
    assert (made.columns["episode/calls"], made.columns["episode/answer"]) == ([1], ["6"])
    assert len(engine.calls) == 2


def test_a_malformed_call_is_text_and_ends_the_episode():
    found, _, engine = played("qwen2_5", "<tool_call>{broken</tool_call>", "6")
    assert len(engine.calls) == 1
    assert found.completions.columns["episode/reward"] == [0.0]


@pytest.mark.parametrize(
    ("name", "settings", "template", "words"),
    [
        ("second_chance", {}, "qwen3", r"environment=second_chance: .*rewrites them: a turn with reasoning"),
        ("second_chance", {}, "qwen2_5", None),
        ("echo", {}, "qwen3", None),
        ("tools", {"tools": [double]}, "qwen3", None),
        ("tools", {"tools": [double]}, "llama3", "environment=tools: the chat template does not write tool calls"),
        ("trl", {"factory": Doubling}, "muse_glimmer", "environment=trl: tool calls .* cannot be read"),
        ("trl", {"factory": Doubling}, "glm4moe", None),
    ],
)
def test_chat_templates_that_do_not_suit_are_refused(name, settings, template, words):
    algorithm = SimpleNamespace(environment=[load_plugin("environment", name, **settings)])
    tokenizer = episode_tokenizer(template)
    problems = template_problems(algorithm, tokenizer, [Prompt(ids=[1], prompt=[user("hi")])])
    assert len(problems) == (words is not None)
    assert all(re.search(words, problem) for problem in problems)
    assert template_problems(algorithm, tokenizer, [Prompt(ids=[1], prompt="hi")]) == [], "plain text has no template"


@pytest.mark.parametrize("template", ["qwen2_5", "llama3_1", "chatml"])
def test_the_tokens_of_tools_are_what_they_add_to_a_prompt(template):
    tokenizer = episode_tokenizer(template)
    environment = load_plugin("environment", "tools", tools=[double], workers="inline")
    algorithm = dataclasses.replace(recipe().algorithm(), environment=[environment])
    message = [user("Twice 3?")]
    sizes = [
        len(tokenizer.apply_chat_template(message, tools=tools, add_generation_prompt=True, return_dict=False))
        for tools in (None, environment.tool_schemas())
    ]
    assert tool_tokens(algorithm, tokenizer) == sizes[1] - sizes[0]
    assert (sizes[1] == sizes[0]) == (template == "chatml")
    assert tool_tokens(recipe().algorithm(), tokenizer) == 0
    tokenizer.chat_template = None
    assert tool_tokens(algorithm, tokenizer) == 0
