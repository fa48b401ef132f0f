"""Conversations to text: with the templates of well-known models no message's text is lost, or the row is refused."""

from __future__ import annotations

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.config.sections import Dataset
from hf_rlhf.contract import chat
from hf_rlhf.data.prompts import load_prompts
from hf_rlhf.data.sources import DatasetError
from tests.helpers.chats import chat_tokenizer

SHAPES = [
    "qwen3",
    "qwen2_5",
    "deepseek_r1_distill",
    "llama3",
    "llama3_1",
    "gemma",
    "phi3",
    "chatml",
    "printing",
    "mistral",
]
THOUGHT = "<think>\ntwo and two\n</think>\n\nIt is 4."


def user(text):
    return {"role": "user", "content": text}


def says(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def prompts(tokenizer, *rows, **settings):
    return list(load_prompts(Dataset(held_out=0, **settings), tokenizer, train=list(rows))[0])


def prompt(tokenizer, messages, **settings):
    """The text of the only prompt."""
    (made,) = prompts(tokenizer, {"prompt": messages}, **settings)
    return tokenizer.decode(made.ids)


def sft(tokenizer, row):
    """The text that is learned."""
    made = load_plugin("trainer", "sft", format="messages" if "messages" in row else "prompt_completion").encode(
        row, tokenizer
    )
    return tokenizer.decode([token for token in made["labels"] if token >= 0])


def dpo(tokenizer, row):
    made = load_plugin("trainer", "dpo").encode(row, tokenizer)
    return tuple(tokenizer.decode(made[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def reward_model(tokenizer, row):
    made = load_plugin("trainer", "reward_model").encode(row, tokenizer)
    return tuple(tokenizer.decode(made[name]) for name in ("chosen_ids", "rejected_ids"))


def whole(tokenizer, row):
    """What is learned of the pair's chosen conversation."""
    return sft(tokenizer, {"messages": [*row["prompt"], *row["chosen"]]})


def pair(chosen, rejected, question="What is 2+2?"):
    return {"prompt": [user(question)], "chosen": [says(chosen)], "rejected": [says(rejected)]}


# lists of parts


@pytest.mark.parametrize("template", [*SHAPES, "smolvlm"])
def test_lists_of_text_parts_are_read_as_texts(template):
    """smolvlm's template reads lists only, so that texts become lists for it."""
    tokenizer = chat_tokenizer(template)
    given = [user(parts("What is", " 2+2?"))]
    assert prompt(tokenizer, given) == prompt(tokenizer, [user("What is 2+2?")])
    assert "What is 2+2?" in prompt(tokenizer, given)
    assert "'type'" not in prompt(tokenizer, given)
    assert "It is 4." in sft(tokenizer, {"messages": [*given, says(parts("It is 4."))]})
    answers = ("It is 4.", "It is 5.") if template != "deepseek_r1_distill" else (THOUGHT, "<think>\nhm\n</think>5")
    row = pair(*map(parts, answers), parts("What is", " 2+2?"))
    first, chosen, rejected = dpo(tokenizer, row)
    assert "What is 2+2?" in first
    assert (chosen, rejected) == dpo(tokenizer, pair(*answers))[1:]
    assert reward_model(tokenizer, row) == (chosen, rejected)
    assert answers[0] in chosen


@pytest.mark.parametrize(
    "part", [{"type": "image", "image": "x.png"}, {"type": "image_url", "image_url": {"url": "x"}}, 3]
)
def test_other_parts_are_refused_with_their_row_and_message(part):
    tokenizer = chat_tokenizer("qwen3")
    with pytest.raises(DatasetError, match=r"row 2 \(the first is 1\): the prompt, message 1: content must be text"):
        prompts(tokenizer, {"prompt": [user("hi")]}, {"prompt": [user([*parts("What is this?"), part])]})
    with pytest.raises(ValueError, match="messages, message 1: content must be text or text parts"):
        sft(tokenizer, {"messages": [user([part]), says("a cat")]})


# losses


def test_white_space_and_escapes_are_no_loss():
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": 'say "é"\n<b> \\frac'}}}
    given = [user("  What is\n2+2? \n"), says(None, tool_calls=[call]), {"role": "tool", "content": 'found: "4"\nso'}]
    for template in ("qwen3", "qwen2_5", "llama3_1", "lfm2_v2", "glm4moe", "qwen3_5_think"):
        assert "search" in prompt(chat_tokenizer(template), given), template
    assert "What is" in prompt(chat_tokenizer("gemma"), [user("  What is\n\n2+2? \n")])


def test_arguments_as_json_text_suit_templates_that_read_mappings():
    call = {"type": "function", "function": {"name": "search", "arguments": '{"query": "Berlin"}'}}
    for template in ("qwen3", "qwen3_5_think", "glm4moe"):
        assert "Berlin" in prompt(chat_tokenizer(template), [user("q"), says("", tool_calls=[call]), user("so?")]), (
            template
        )


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        ("without_system", [{"role": "system", "content": "Be brief."}, user("hi")], r"message 1 \(system\): 'Be brief.'"),
        ("deepseek_r1_distill", [user("q"), says(THOUGHT), user("sure?")], r"message 2 \(assistant\): '<think>"),
        ("qwen3", [user("q"), says("It is 4.", reasoning_content="two and two"), user("sure?")], "'two and two'"),
        ("llama3", [user("q"), says("4", thinking="two and two"), user("sure?")], "'two and two'"),
        ("llama3_1", [user("q"), says("Let me see.", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
                      {"role": "tool", "content": "4"}], "'Let me see.'"),
        ("chatml", [user("q"), says("", tool_calls=[{"function": {"name": "multiply", "arguments": {}}}]), user("so?")],
         "'multiply'"),
        ("qwen3", [user("q"), says(f"Well. {THOUGHT}"), user("so?")], "'Well. <think>"),
    ],
)  # fmt: skip
def test_text_that_a_template_drops_is_named_with_its_row(template, messages, lost):
    with pytest.raises(DatasetError, match=rf"row 1 .*the chat template drops part of .*{lost}"):
        prompts(chat_tokenizer(template), {"prompt": messages})


def test_an_equal_text_elsewhere_does_not_stand_in_for_a_lost_one():
    twice = [{"role": "system", "content": "hi"}, user("hi")]
    with pytest.raises(DatasetError, match=r"drops part of message \d \(\w+\): 'hi'"):
        prompts(chat_tokenizer("without_system"), {"prompt": twice})
    assert prompt(chat_tokenizer("chatml"), twice).count("hi") == 2


def test_an_empty_thought_may_be_dropped():
    given = [user("q"), says("<think>\n\n</think>\n\nIt is 4."), user("sure?")]
    assert "It is 4." in prompt(chat_tokenizer("qwen3"), given)


# refusals


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("gemma", "System role not supported"),
        ("without_system", "drops part of message 1"),
        ("mistral", "must alternate"),
    ],
)
def test_a_system_message_that_a_template_does_not_take_is_blamed_on_its_setting(template, words):
    with pytest.raises(DatasetError, match=rf"row 1 .*dataset\.system is a message .*{words}"):
        prompts(chat_tokenizer(template), {"prompt": "hi"}, chat=True, system="Be brief.")
    with pytest.raises(DatasetError, match=rf"row 1 (?!.*dataset\.system).*{words}"):
        prompts(chat_tokenizer(template), {"prompt": [{"role": "system", "content": "Be brief."}, user("hi")]})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no, thanks') }}", "no, thanks"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[0].missing.deep }}", "UndefinedError: 'dict object' has no attribute 'missing'"),
        ("{% for %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_fails_is_an_error_of_the_row_in_its_own_words(template, words):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(
        DatasetError, match=rf"row 1 \(the first is 1\): the chat template refuses the conversation: {words}"
    ):
        prompts(tokenizer, {"prompt": [user("hi")]})
    for encode in (dpo, reward_model):
        with pytest.raises(ValueError, match=words):
            encode(tokenizer, pair("a", "b"))
    with pytest.raises(ValueError, match=words):
        sft(tokenizer, {"messages": [user("hi"), says("a")]})


# reasoning


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "qwen3", "qwen3_5_think"])
def test_reasoning_is_learned_and_scored_as_it_is(template):
    """DeepSeek's template drops it; TRL's training version of it does not."""
    tokenizer = chat_tokenizer(template)
    row = pair(THOUGHT, THOUGHT.replace("two and two", "hm"))
    begin, chosen, rejected = dpo(tokenizer, row)
    assert THOUGHT in chosen
    assert THOUGHT.replace("two and two", "hm") in rejected
    assert reward_model(tokenizer, row) == (chosen, rejected)
    assert begin == prompt(tokenizer, row["prompt"]), "DPO's prompt is that of a rollout"
    learned = sft(tokenizer, {"prompt": row["prompt"], "completion": row["chosen"]})
    assert begin + learned == chosen.rstrip("\n")
    assert "two and two\n</think>\n\nIt is 4." in sft(tokenizer, {"messages": [*row["prompt"], *row["chosen"]]})


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "qwen3"])
def test_reasoning_of_earlier_turns_is_kept_or_refused(template):
    tokenizer = chat_tokenizer(template)
    turns = [user("q"), says(THOUGHT), user("And 3+3?")]
    assert THOUGHT in sft(tokenizer, {"messages": [*turns, says("<think>\nthrees\n</think>\n\n6")]})
    row = {
        "prompt": turns,
        "chosen": [says("<think>\nthrees\n</think>\n\n6")],
        "rejected": [says("<think>\nx\n</think>\n\n7")],
    }
    assert all(THOUGHT in text for text in dpo(tokenizer, row))
    assert all(THOUGHT in text for text in reward_model(tokenizer, row))


@pytest.mark.parametrize("encode", [dpo, reward_model, whole])
def test_where_no_training_template_is_known_all_three_refuse(encode):
    with pytest.raises(ValueError, match=r"drops part of message 2 \(assistant\): '<think>.*set model.chat_template"):
        encode(chat_tokenizer("forgetful"), pair(THOUGHT, "5"))


def test_a_prompt_that_opens_a_thought_needs_answers_that_have_one():
    for encode in (dpo, lambda tokenizer, row: sft(tokenizer, {"prompt": row["prompt"], "completion": row["chosen"]})):
        with pytest.raises(ValueError, match="renders the prompt differently once it is answered"):
            encode(chat_tokenizer("thinking"), pair("It is 4.", "It is 5."))
    assert "It is 4." in dpo(chat_tokenizer("thinking", enable_thinking=False), pair("It is 4.", "It is 5."))[1]


# beginnings of texts


def test_a_text_has_one_bos():
    tokenizer = chat_tokenizer("mistral", bos=True)
    rendered = tokenizer.apply_chat_template([user("hi")], tokenize=False)
    assert rendered.startswith("<s>")
    for text in (rendered, rendered.removeprefix("<s>"), "<s>" + rendered):
        assert prompt(tokenizer, text) == rendered
        row = {"prompt": text, "chosen": " yes", "rejected": " no"}
        assert dpo(tokenizer, row) == (rendered, f"{rendered} yes<|im_end|>", f"{rendered} no<|im_end|>")
        assert reward_model(tokenizer, row) == (f"{rendered} yes", f"{rendered} no")
        made = load_plugin("trainer", "sft").encode({"prompt": text, "completion": "yes"}, tokenizer)
        assert tokenizer.decode(made["input_ids"]) == f"{rendered}yes<|im_end|>"
    assert prompt(tokenizer, [user("hi")]) == rendered


# variables of the template


def test_variables_of_the_template_are_those_of_every_rendering():
    thinking, other = chat_tokenizer("thinking"), chat_tokenizer("thinking", enable_thinking=False)
    assert prompt(thinking, [user("hi")]).endswith("assistant\n<think>\n")
    assert prompt(other, [user("hi")]).endswith("assistant\n")
    qwen = chat_tokenizer("qwen3", enable_thinking=False)
    end = "<think>\n\n</think>\n\n"
    assert prompt(qwen, [user("hi")]).endswith(end)
    assert dpo(qwen, pair("4", "5"))[0].endswith(end)
    assert sft(qwen, {"prompt": [user("q")], "completion": "4"}) == "4<|im_end|>"


# tags that a prompt leaves open


@pytest.mark.parametrize(
    ("template", "messages", "opening"),
    [
        ("deepseek_r1_distill", [user("q")], "<think>\n"),
        ("qwen3_5_think", [user("q")], "<think>\n"),
        ("qwen3", [user("q")], ""),
        ("chatml", [user("Write <think>")], ""),
        ("chatml", [user("q"), says("<think>")], "<think>"),
        ("chatml", "Question: 2+2? Assistant: <think>", "<think>"),
    ],
)
def test_the_tag_that_a_prompt_leaves_open_is_known(template, messages, opening):
    (made,) = prompts(chat_tokenizer(template), {"prompt": messages})
    assert made.opening == opening


def test_a_conversation_of_one_message_may_be_anything_that_is_a_sequence():
    assert chat.messages_of((user("hi"),), "prompt") == [user("hi")]
    with pytest.raises(chat.ChatError, match="prompt must be a text or a list of messages"):
        chat.messages_of([], "prompt")
