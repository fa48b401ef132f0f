"""Tokens of an episode: kept as sampled, in one row where the template keeps earlier turns, else in forks."""

from __future__ import annotations

import pytest

from hf_rlhf.contract.chat import ChatError
from hf_rlhf.data.transcript import Transcript, same_message
from tests.helpers.chats import chat_tokenizer, sentencepiece_tokenizer
from tests.helpers.episodes import (
    PLAIN,
    SEARCH,
    SIDE_BY_SIDE,
    TOOLS,
    TWO,
    calls,
    episode_tokenizer,
    found,
    rendering,
    says,
    thinking,
    turn_ids,
    user,
)

KEEP = ["chatml", "printing", "qwen2_5", "qwen3_instruct_2507", "llama3", "llama3_1", "gemma3", "cohere2", "smolvlm", "lfm2_v2",
        "idefics3", "mistral", "qwen3_training", "phi3"]  # fmt: skip
KEEP_CALLS = ["qwen2_5", "qwen3_instruct_2507", "qwen3_training", "qwen3_8", "qwen3_vl", "llama3_1", "lfm2_v2", "gptoss",
              "glm4moe", "gemma4_v5"]  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}


def play(tokenizer, conversation, tools=None, history="extend"):
    """The transcript of a policy that samples what the template writes, and the prompts of its turns."""
    transcript = Transcript(tokenizer=tokenizer, messages=conversation[:1], history=history, tools=tools)
    said, asks = [], []
    for message in conversation:
        if message["role"] == "assistant":
            ask = transcript.ask(said)
            asks.append((ask.ids, rendering(tokenizer, said, tools)))
            ids = turn_ids(tokenizer, said, message, tools)
            answer = transcript.answer(ask.row, ids, [-0.5] * len(ids))
            assert same_message(answer, message), (answer, message)
            message = answer
        said.append(message)
    return transcript, asks


def trained(transcript):
    """The tokens that train, by turn."""
    turns, row = {}, transcript.row
    assert len(row.completion_ids) == len(row.mask) == len(row.logps) == len(row.turns)
    for token, mask, logp, turn in zip(row.completion_ids, row.mask, row.logps, row.turns, strict=True):
        assert (mask == 1) == (turn >= 0) == (logp != 0)
        if mask:
            turns.setdefault(turn, []).append(token)
    return [turns[number] for number in sorted(turns)]


# one row


@pytest.mark.parametrize("template", KEEP)
@pytest.mark.parametrize("conversation", [PLAIN, TWO, [SYSTEM, *PLAIN]], ids=["plain", "two_users", "system"])
def test_the_row_is_the_conversation_as_the_template_renders_it(template, conversation):
    if (template in ("cohere2", "gemma3", "mistral") and conversation is TWO) or (
        template in ("cohere2", "mistral") and conversation[0] is SYSTEM
    ):
        pytest.skip("the template refuses two users in a row, or a system message")
    tokenizer = episode_tokenizer(template)
    transcript, asks = play(tokenizer, conversation)
    for ids, text in asks:
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    row = transcript.row
    assert row.prompt_ids == asks[0][0]
    assert len(trained(transcript)) == len(asks)
    assert row.mask[0] == row.mask[-1] == 1


@pytest.mark.parametrize("template", KEEP_CALLS)
@pytest.mark.parametrize("conversation", [TOOLS, SIDE_BY_SIDE], ids=["one_by_one", "side_by_side"])
def test_tool_calls_and_results_are_rows_as_rendered(template, conversation):
    if template in ("llama3_1", "gptoss") and conversation is SIDE_BY_SIDE:
        pytest.skip("the template renders one call of a turn")
    tokenizer = episode_tokenizer(template)
    transcript, asks = play(tokenizer, conversation, [SEARCH])
    for ids, text in asks:
        assert tokenizer.decode(ids) == text
    row = transcript.row
    assert [m["role"] for m in row.messages] == [m["role"] for m in conversation]
    assert row.messages[1]["tool_calls"] == conversation[1]["tool_calls"]


@pytest.mark.parametrize(
    ("template", "field"),
    [("qwen3", "reasoning_content"), ("qwen3_5_think", "reasoning_content"), ("glm4moe", "reasoning_content"),
     ("nemotron_3_nano", "reasoning_content"), ("lfm2_2_5", "thinking"), ("qwen3_training", "reasoning_content")],
)  # fmt: skip
def test_reasoning_between_tool_calls_is_kept(template, field):
    tokenizer = episode_tokenizer(template)
    transcript, asks = play(tokenizer, thinking(TOOLS, field), [SEARCH])
    for ids, text in asks:
        assert tokenizer.decode(ids) == text
    row = transcript.row
    assert row.messages[1][field] == "Thought 1."


# tokens are kept


def test_sampled_tokens_are_kept_where_their_text_has_others():
    tokenizer = chat_tokenizer("chatml", special=())
    tokenizer.add_tokens(["Hello"])
    transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")])
    ask = transcript.ask([user("hi")])
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "Hello"]
    assert tokenizer("Hello")["input_ids"] != letters
    answer = transcript.answer(ask.row, [*letters, tokenizer.eos_token_id], [-1.0] * 6)
    again = transcript.ask([user("hi"), answer, user("more")])
    assert again.ids[: len(ask.ids) + 6] == [*ask.ids, *letters, tokenizer.eos_token_id]
    assert (
        tokenizer.decode(again.ids[len(ask.ids) + 6 :]) == "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_first_turn_has_the_tokens_of_the_dataset():
    tokenizer = chat_tokenizer("chatml")
    transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")], prompt_ids=[1, 2, 3])
    assert transcript.ask([user("hi")]).ids == [1, 2, 3]
    assert transcript.ask([user("ho")]).ids != [1, 2, 3]


def test_rows_end_with_a_sampled_token():
    tokenizer = episode_tokenizer("qwen2_5")
    transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")])
    assert transcript.row is None
    ask = transcript.ask([user("hi")])
    answer = transcript.answer(ask.row, turn_ids(tokenizer, [user("hi")], says("Yes."), None))
    before = transcript.row
    transcript.ask([user("hi"), answer, user("more")])  # never answered: turns or tokens are used up
    assert transcript.row == before
    with pytest.raises(ValueError, match="row 0 was not asked"):
        [transcript.answer(0, [1]) for _ in range(2)]


def test_turns_that_do_not_train_have_mask_0_and_keep_their_number():
    tokenizer = episode_tokenizer("chatml")
    transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")])
    ask = transcript.ask([user("hi")])
    answer = transcript.answer(ask.row, [65, tokenizer.eos_token_id], [-1.0, -1.0], train=False)
    ask = transcript.ask([user("hi"), answer, user("more")])
    transcript.answer(ask.row, [66])
    row = transcript.row
    assert (row.mask[:2], row.mask[-1]) == ([0, 0], 1)
    assert (row.turns[:3], row.turns[-1]) == ([0, 0, -1], 1)


# cut turns


@pytest.mark.parametrize("template", KEEP)
def test_a_turn_cut_by_length_gets_the_closing_tokens_of_the_template(template):
    tokenizer = episode_tokenizer(template)
    ids = turn_ids(tokenizer, [user("hi")], says("Hello there."), None)
    asks = []
    for sampled in (ids, ids[:-1]):
        transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")])
        ask = transcript.ask([user("hi")])
        answer = transcript.answer(ask.row, sampled, finish_reason="length" if sampled is not ids else "stop")
        assert answer["content"] == "Hello there."
        asks.append(transcript.ask([user("hi"), answer, user("more")]).ids)
        transcript.answer(0, [65])
        row = transcript.row
        assert (sum(row.mask), row.mask[: len(sampled)]) == (len(sampled) + 1, [1] * len(sampled))
    assert asks[0] == asks[1], "the closing token was sampled, or is the template's"


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1", "glm4moe", "lfm2_v2"])
def test_a_turn_cut_inside_a_call_or_a_thought_is_text_and_is_closed(template):
    tokenizer = episode_tokenizer(template)
    whole = turn_ids(tokenizer, [user("Berlin?")], calls("Berlin"), [SEARCH])
    for cut in range(1, len(whole)):
        transcript = Transcript(tokenizer=tokenizer, messages=[user("Berlin?")], tools=[SEARCH])
        ask = transcript.ask([user("Berlin?")])
        answer = transcript.answer(ask.row, whole[:cut], finish_reason="length")
        follow = found("a city") if answer.get("tool_calls") else user("Go on.")
        again = transcript.ask([user("Berlin?"), answer, follow])
        assert again.row == ask.row
        assert again.ids[: len(ask.ids) + cut] == ask.ids + whole[:cut]
        new = tokenizer.decode(again.ids[len(ask.ids) + cut :])
        assert follow["content"] in new
        assert any(new.startswith(end) for end in ("<|im_end|>", "<|eot_id|>", "\n<|user|>", "<|user|>", "\n<|observation|>",
                                                   "<|observation|>")), new  # fmt: skip


# forks


REWRITE = ["qwen3", "qwen3_5_think", "gptoss", "glm4moe", "nemotron_3_nano", "lfm2_2_5"]


@pytest.mark.parametrize("template", [*REWRITE, "qwen2_5", "llama3_1", "qwen3_training"])
@pytest.mark.parametrize("conversation", [PLAIN, [*TOOLS, *PLAIN]], ids=["plain", "tools"])
@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_as_rendered_asks_with_what_the_template_renders(template, conversation, field):
    """Where it drops earlier reasoning each such turn is a fork; all turns train once."""
    tools = [SEARCH] if conversation is not PLAIN else None
    thoughts = thinking(conversation, field) if template in REWRITE else conversation
    tokenizer = episode_tokenizer(template)
    if template in REWRITE and (field == "thinking") != (template in ("gptoss", "lfm2_2_5")):
        pytest.skip("the template reads another field")
    if template == "gptoss" and tools:
        pytest.skip("the template's thoughts of a turn depend on what follows it")
    transcript, asks = play(tokenizer, thoughts, tools, "as_rendered")
    for ids, text in asks:
        assert tokenizer.decode(ids) == text
    assert len(trained(transcript)) == len(asks)
    assert bool(transcript.row.forks) == (template in REWRITE)
    samples = [turn_ids(tokenizer, thoughts[:i], m, tools) for i, m in enumerate(thoughts) if m["role"] == "assistant"]
    if template in ("qwen2_5", "llama3_1", "qwen3_training"):
        assert trained(transcript) == samples


def test_another_continuation_is_a_fork_with_the_tokens_kept():
    tokenizer = episode_tokenizer("qwen2_5")
    transcript, _ = play(tokenizer, PLAIN)
    row = transcript.row
    said = row.messages[:2]
    fork = transcript.ask([*said, user("something else")])
    assert fork.row == 1
    size = row.turns.index(-1)
    assert fork.ids[: len(row.prompt_ids) + size] == row.prompt_ids + row.completion_ids[:size]
    transcript.answer(fork.row, [65, tokenizer.eos_token_id], [-1.0, -1.0])
    after = transcript.row
    old, new = len(row.completion_ids), [65, tokenizer.eos_token_id]
    assert after.prompt_ids == row.prompt_ids
    assert (after.completion_ids, after.mask[old:]) == (row.completion_ids + new, [1, 1])
    assert (after.turns, after.forks) == ([*row.turns, 3, 3], [(old, fork.ids)])
    assert [message["content"] for message in after.messages] == [
        "hi",
        "Hello there.",
        "something else",
        after.messages[-1]["content"],
    ]


def test_a_turn_asked_again_is_a_fork_and_other_tools_or_prompts_start_anew():
    tokenizer = episode_tokenizer("qwen2_5")
    transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")])
    asks = [transcript.ask([user("hi")]), transcript.ask([user("hi")]), transcript.ask([user("hi")], tools=[SEARCH])]
    asks.append(transcript.ask([SYSTEM, user("hi")]))
    assert [ask.row for ask in asks] == [0, 1, 2, 3]
    assert asks[0].ids == asks[1].ids
    answers = [transcript.answer(row, [65 + row, tokenizer.eos_token_id]) for row in range(4)]
    for row, prompt in enumerate(([user("hi")], [user("hi")], None, [SYSTEM, user("hi")])):
        if prompt:
            assert transcript.ask([*prompt, answers[row], user("more")]).row == row
    assert "search" in tokenizer.decode(asks[2].ids)


def test_the_first_row_that_holds_a_turn_is_extended():
    tokenizer = episode_tokenizer("qwen2_5")
    transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")])
    for row in range(2):
        ask = transcript.ask([user("hi")])
        answer = transcript.answer(ask.row, [65, tokenizer.eos_token_id])
        assert ask.row == row
    assert transcript.ask([user("hi"), answer, user("more")]).row == 0


# normal form


@pytest.mark.parametrize(
    "changed",
    [
        {"content": " It is\n"},
        {"content": [{"type": "text", "text": "It is"}]},
        {"reasoning_content": None},
        {"tool_calls": [{"id": "1", "function": {"name": "search", "arguments": '{"a": 1, "query": "x"}'}}]},
        {"finish_reason": "stop", "turn": 0},
    ],
)
def test_messages_match_by_normal_form(changed):
    arguments = {"query": "x", "a": 1}
    message = says(
        "It is", reasoning_content="hm", tool_calls=[{"function": {"name": "search", "arguments": arguments}}]
    )
    tokenizer = episode_tokenizer("qwen2_5")
    transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")], tools=[SEARCH])
    transcript.ask([user("hi")])
    transcript.answer(0, turn_ids(tokenizer, [user("hi")], message | {"reasoning_content": None}, [SEARCH]))
    transcript._rows[0].messages[-1] |= {"reasoning_content": "hm"}
    assert transcript.ask([user("hi "), message | changed, found("y")]).row == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"content": "It was"},
        {"role": "user"},
        {"reasoning_content": "other"},
        {"tool_calls": None},
        {"tool_calls": [{"function": {"name": "search", "arguments": {"query": "y"}}}]},
        {"tool_calls": [{"function": {"name": "find", "arguments": {"query": "x"}}}]},
    ],
)
def test_other_messages_do_not_match(changed):
    message = says(
        "It is", reasoning_content="hm", tool_calls=[{"function": {"name": "search", "arguments": {"query": "x"}}}]
    )
    assert same_message(message, dict(message))
    assert not same_message(message, message | changed)


# texts


def test_turns_after_a_text_follow_each_other_as_they_are():
    tokenizer = chat_tokenizer("chatml", bos=True)
    transcript = Transcript(tokenizer=tokenizer, messages=[user("3+4=")], text=True)
    ask = transcript.ask([user("3+4=")])
    assert tokenizer.decode(ask.ids) == "<s>3+4="
    answer = transcript.answer(
        ask.row, [*tokenizer("8", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    )
    assert answer == {"role": "assistant", "content": "8", "finish_reason": "stop"}
    again = transcript.ask([user("3+4="), answer, user("no, 3+4=")])
    assert tokenizer.decode(again.ids) == "<s>3+4=8<|im_end|>no, 3+4="
    assert again.row == 0


def test_a_text_keeps_the_first_space_of_a_turn():
    tokenizer = sentencepiece_tokenizer()
    transcript = Transcript(tokenizer=tokenizer, messages=[user("A:")], text=True)
    ask = transcript.ask([user("A:")])
    assert transcript.answer(ask.row, tokenizer.convert_tokens_to_ids(["▁4", "▁apples"]))["content"] == " 4 apples"


# refusals


def test_messages_that_a_template_drops_or_refuses_are_errors():
    tokenizer = episode_tokenizer("gemma3")
    transcript = Transcript(tokenizer=tokenizer, messages=[user("hi")])
    ask = transcript.ask([user("hi")])
    answer = transcript.answer(ask.row, turn_ids(tokenizer, [user("hi")], says("Yes."), None))
    with pytest.raises(ChatError, match="must alternate"):
        transcript.ask([user("hi"), answer, user("a"), user("b")])
    assert transcript.ask([user("hi"), answer, user("a")]).row == 0, "a refused conversation changes nothing"
    with pytest.raises(ChatError, match="text parts"):
        transcript.ask([user([{"type": "image"}])])
    tokenizer.chat_template = None
    with pytest.raises(ChatError, match=r"model\.chat_template"):
        Transcript(tokenizer=tokenizer, messages=[user("hi")])
