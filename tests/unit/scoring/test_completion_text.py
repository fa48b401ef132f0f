"""Completions as text: what they add to the text of their prompts."""

from __future__ import annotations

import pytest

from hf_rlhf.scoring.completion_text import CompletionText
from tests.helpers.chats import sentencepiece_tokenizer
from tests.helpers.models import byte_tokenizer


def ids(text):
    """Tokens of "Q: 2+2? A:" and the like: bytes, but for words."""
    tokenizer = sentencepiece_tokenizer()
    return [token for word in text for token in (tokenizer.convert_tokens_to_ids([word]))]


APPLES = ids(["▁4", "▁apples", "</s>"])
QUESTION = ids(["<s>", "▁A", ":"])


def test_the_first_space_belongs_to_the_completion():
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.batch_decode([APPLES], skip_special_tokens=True) == ["4 apples"], "decoded alone, it is stripped"
    text = CompletionText(tokenizer)
    assert text([QUESTION], [APPLES]) == [" 4 apples"]
    long = ids(["<s>", *["▁A"] * 50, ":"])
    assert text([long, QUESTION], [APPLES, ids(["▁4"])]) == [" 4 apples", " 4"]
    assert text([ids(["<s>"])], [APPLES]) == ["4 apples"], "a text without a prompt begins with no space"
    assert text([[]], [APPLES]) == ["4 apples"]
    assert text.characters(QUESTION, APPLES[:1]) == len(" 4")


def test_characters_of_several_byte_tokens_are_whole_on_both_sides():
    """A run of bytes is decoded as one, so that half a character before a completion would spoil it."""
    cats, cat = (
        ids([f"<0x{byte:02X}>" for byte in "🐈".encode() * 5]),
        ids([f"<0x{byte:02X}>" for byte in "🐈".encode()]),
    )
    text = CompletionText(sentencepiece_tokenizer())
    assert text([cats, QUESTION], [cat, cat]) == ["🐈", "🐈"]
    byte = byte_tokenizer()
    assert CompletionText(byte)([byte("naïve é").input_ids], [byte(" ü").input_ids]) == [" ü"]


@pytest.mark.parametrize("prompt", ["", "2+2=", "a\n", "é"])
def test_byte_level_completions_are_what_they_were(prompt):
    tokenizer = byte_tokenizer()
    rows = [tokenizer(text).input_ids for text in (" 4", "4", "", " 🐈 x", "\n")]
    alone = tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert CompletionText(tokenizer)([tokenizer(prompt).input_ids] * len(rows), rows) == alone


def test_of_special_tokens_all_but_the_end_may_be_shown():
    tokenizer = byte_tokenizer(additional_special_tokens=["<think>", "<answer>"])
    row = [*tokenizer("<think>4<answer>").input_ids, tokenizer.eos_token_id]
    assert CompletionText(tokenizer)([[65]], [row]) == ["4"]
    shown = CompletionText(tokenizer, skip_special_tokens=False)
    assert shown([[65]], [row]) == ["<think>4<answer>"]
    assert shown([[65]], [row[:-1]]) == ["<think>4<answer>"], "a tag that ends a completion stays"
    other = tokenizer.convert_tokens_to_ids("<answer>")
    assert CompletionText(tokenizer, False, [other])([[65]], [row[:-1]]) == ["<think>4"], (
        "unless generation ends with it"
    )
