"""Templates that write earlier turns differently, or calls that cannot be read, are refused with the ways out."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_rlhf.contract.chat import ChatError
from hf_rlhf.data.history import check_calls, check_history, rewriting
from tests.helpers.episodes import SEARCH, episode_tokenizer

PLAIN = "a turn followed by a message of the role user"
REASONING = "a turn with reasoning followed by a message of the role user"


@pytest.mark.parametrize(
    ("template", "kwargs", "found"),
    [
        ("qwen3", {}, REASONING),
        ("qwen3", {"enable_thinking": False}, PLAIN),
        ("qwen3_5_think", {}, REASONING),
        ("qwen3_5_nothink", {}, PLAIN),
        ("glm4moe", {}, REASONING),
        ("gptoss", {}, PLAIN),
        ("deepseek_r1_distill", {}, REASONING),
        ("nemotron_3_nano", {}, REASONING),
        ("lfm2_2_5", {}, REASONING),
        ("forgetful", {}, REASONING),
        *(
            (name, {}, None)
            for name in ("chatml", "qwen2_5", "qwen3_instruct_2507", "llama3", "llama3_1", "gemma3", "phi3")
        ),
        *((name, {}, None) for name in ("cohere2", "smolvlm", "mistral", "thinking", "deepseek_r1_distill_training")),
        *((name, {}, None) for name in ("qwen3_training", "qwen3_5_think_training")),
        ("qwen3_training", {"enable_thinking": False}, None),
    ],
)
def test_turns_that_a_template_rewrites_are_named(template, kwargs, found):
    assert rewriting(episode_tokenizer(template, **kwargs)) == found


@pytest.mark.parametrize(
    "template", ["qwen3", "qwen3_5_think", "glm4moe", "gptoss", "nemotron_3_nano", "lfm2_2_5", "llama3_1"]
)
def test_templates_keep_reasoning_between_tool_calls(template):
    assert rewriting(episode_tokenizer(template), ("tool",), [SEARCH]) is None


def test_the_refusal_says_the_ways_out():
    with pytest.raises(
        ChatError, match=r"the chat template rewrites them: .*reasoning.*Set model.chat_template to /"
    ) as refused:
        check_history(episode_tokenizer("qwen3"))
    file = str(refused.value).partition("model.chat_template to ")[2].partition(",")[0]
    tokenizer = episode_tokenizer("qwen3")
    tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
    check_history(tokenizer)
    with pytest.raises(ChatError, match=r"Set model\.chat_template to a template that keeps them"):
        check_history(episode_tokenizer("gptoss"))


@pytest.mark.parametrize(
    "template",
    ["qwen2_5", "qwen3", "qwen3_training", "qwen3_5_think", "llama3_1", "gptoss", "glm4moe", "lfm2_v2", "gemma4_v5"],
)
def test_calls_of_known_families_are_read(template):
    check_calls(episode_tokenizer(template), [SEARCH])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("llama3", "does not write tool calls"),
        ("deepseekv3", "does not show tools"),
        ("muse_glimmer", r"cannot be read: .*<atem:function_calls>.*response_template"),
    ],
)
def test_templates_that_are_not_for_tools_are_refused(template, words):
    with pytest.raises(ChatError, match=rf"{words}"):
        check_calls(episode_tokenizer(template), [SEARCH])
