"""Sampled turns as messages: text, reasoning, tool calls; a malformed call is text, with the reason."""

from __future__ import annotations

import pytest

from hf_rlhf.data.turn_parsing import parse_chat, parse_text
from tests.helpers.chats import chat_tokenizer
from tests.helpers.episodes import SEARCH, episode_tokenizer

HEADER = "<|im_start|>assistant\n"


def chat(text, template="chatml", prefix=HEADER, tools=(SEARCH,)):
    tokenizer = episode_tokenizer(template)
    return parse_chat(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], prefix, tools)


def text(given, tools=(SEARCH,)):
    tokenizer = chat_tokenizer("chatml")
    return parse_text(tokenizer, tokenizer(given)["input_ids"], tokenizer("2+2=")["input_ids"], tools)


def made(**arguments):
    return [{"type": "function", "function": {"name": "search", "arguments": arguments}}]


@pytest.mark.parametrize("template", ["chatml", "qwen3", "qwen3_training"])
def test_calls_in_json_are_read(template):
    given = 'Let me see.\n<tool_call>\n{"name": "search", "arguments": {"query": "Berlin"}}\n</tool_call><|im_end|>'
    assert chat(given, template) == {"role": "assistant", "content": "Let me see.", "tool_calls": made(query="Berlin")}


def test_reasoning_is_apart_where_the_parser_knows_it():
    given = "<think>\ntwo and two\n</think>\n\nIt is 4.<|im_end|>"
    assert chat(given, "qwen3") == {"role": "assistant", "content": "It is 4.", "reasoning_content": "two and two"}
    assert chat(given)["content"] == "<think>\ntwo and two\n</think>\n\nIt is 4."


def test_a_thought_that_the_prompt_opens_stays_whole():
    answer = chat("two and two\n</think>\n\nIt is 4.<|im_end|>", "thinking", HEADER + "<think>\n")
    assert answer["content"] == "<think>\ntwo and two\n</think>\n\nIt is 4."


def test_a_response_template_of_the_tokenizer_comes_first():
    tokenizer = episode_tokenizer("qwen3")
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "fields": {"content": {"close_pattern": r"<\|im_end\|>", "content": "text"}},
    }
    given = "<think>a</think>b<|im_end|>"
    assert parse_chat(tokenizer, tokenizer(given)["input_ids"], HEADER)["content"] == "<think>a</think>b"


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "search", "arguments": {"query": "Ber',
        '{"name": 3}',
        '{"name": "search", "arguments": [1]}',
        "[]",
        '"x"',
        "",
    ],
)
@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_a_malformed_call_is_text_with_the_reason(call, template):
    given = f"<tool_call>\n{call}\n</tool_call><|im_end|>"
    answer = chat(given, template)
    assert answer["parse_error"]
    assert "tool_calls" not in answer
    assert answer["content"] == given.removesuffix("<|im_end|>")


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ("[search(Berlin)]", {"query": "Berlin"}),
        ("[search(3*4)]", {"query": "3*4"}),
        ("[search(12)]", {"query": "12"}),
        ("[search('a, b')]", {"query": "a, b"}),
        ('[search(query="x")]', {"query": "x"}),
        ("[search()]", {}),
    ],
)
def test_calls_after_a_text_are_in_brackets(given, arguments):
    assert text(f"Hm {given}<|im_end|>") == {"role": "assistant", "content": "Hm ", "tool_calls": made(**arguments)}


def test_several_calls_and_parameters():
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    add = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    read = [call["function"]["arguments"] for call in text("[add(1, b=2)][add(3, 4)]", [add])["tool_calls"]]
    assert read == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert "must be Python literals" in text("[add(one, 2)]", [add])["parse_error"]
    assert "must be Python literals" in text("[add(1, 2, 3)]", [add])["parse_error"]


def test_without_tools_nothing_is_a_call():
    assert text("[search(x)]", None) == {"role": "assistant", "content": "[search(x)]"}
    assert "tool_calls" not in chat('<tool_call>{"name": "search", "arguments": {}}</tool_call>', tools=None)
