"""Tokens and labels of a row: the policy learns what it would sample, the end-of-sequence token included."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import chat

from ._conversations import answers_to
from ._labels import UNLABELLED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "{% generation"
"""Tag by which a chat template marks the assistant's text (transformers)."""
Part = tuple[list[int], bool]
"""Tokens, and True if they are learned."""


def of_completion(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> list[Part]:
    """Tokenize the prompt alone, as in a rollout, and the completion after it: texts, or lists of messages."""
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise ValueError(f"completion must be a text, like prompt, got {completion!r:.80}")
        return [(_ids(tokenizer, prompt, special=True), False), (_ended(tokenizer, _ids(tokenizer, completion)), True)]
    before, (whole,) = answers_to(tokenizer, prompt, ("completion", completion))
    answer = _ended(tokenizer, _ids(tokenizer, whole[len(before) :]))
    return [(_ids(tokenizer, before), False), (answer, True)]


def of_messages(tokenizer: PreTrainedTokenizerBase, given: Any) -> list[Part]:
    """Tokenize a conversation, of which the assistant's turns are learned."""
    messages = chat.messages_of(given, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("messages must have an assistant turn: only these are learned")
    conversation = chat.Conversation(messages)
    found = chat.chat_of(tokenizer, conversation, training=True)
    if MARKER in (found.template or str(tokenizer.chat_template)):
        return _marked(found, conversation)
    try:
        parts = _turns(found, messages)
    except chat.ChatError:  # a part of the conversation alone, which the whole is not
        parts = None
    return _marked(dataclasses.replace(found, template=_known(tokenizer)), conversation) if parts is None else parts


def of_text(tokenizer: PreTrainedTokenizerBase, text: Any) -> list[Part]:
    """Tokenize a text, all of it learned, and append the end-of-sequence token."""
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {text!r:.80}")
    return [(_ended(tokenizer, _ids(tokenizer, text, special=True)), True)]


def labelled(parts: list[Part], all_of_it: bool) -> dict[str, Any] | None:
    """Return input_ids and labels, -100 for unlearned tokens; None if no token after the first has a label."""
    ids = [token for tokens, _ in parts for token in tokens]
    labels = [token if learned or all_of_it else UNLABELLED for tokens, learned in parts for token in tokens]
    if not any(label != UNLABELLED for label in labels[1:]):
        return None
    return {"input_ids": ids, "labels": labels}


def _turns(found: chat.Chat, messages: chat.Messages) -> list[Part] | None:
    """Split at each assistant turn; returns None if the template renders earlier turns differently later on."""
    tokenizer = found.tokenizer
    parts: list[Part] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = found.text(chat.Conversation(messages[:place], "answer")) if place else ""
        after = found.text(chat.Conversation(messages[: place + 1]))
        if not before.startswith(done) or not after.startswith(before):
            return None
        parts.append((_ids(tokenizer, before[len(done) :]), False))
        turn, rest = _split(tokenizer, _ids(tokenizer, after[len(before) :]))
        parts += [(turn, True), (rest, False)]
        done = after
    whole = found.text(chat.Conversation(messages))
    if not whole.startswith(done):
        return None
    return [*parts, (_ids(tokenizer, whole[len(done) :]), False)]


def _marked(rendering: chat.Chat, conversation: chat.Conversation) -> list[Part]:
    """Split by the marks of the chat template; the end-of-sequence token after a turn belongs to it."""
    tokenizer = rendering.tokenizer
    rendering.text(conversation)  # raises where text is lost
    found: Any = rendering.apply(conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]]
    if not any(mask):
        raise ValueError("the chat template's {% generation %} must mark assistant turns, but marks none. Fix it")
    for i in range(1, len(ids)):
        mask[i] = mask[i] or (mask[i - 1] and ids[i] == tokenizer.eos_token_id != ids[i - 1])
    return [([token], learned) for token, learned in zip(ids, mask, strict=True)]


def _known(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return TRL's version of the chat template with marks, if it knows the template."""
    template = chat.training_template(tokenizer)
    if template is None:
        raise ValueError(
            "the chat template renders earlier turns differently once there are later ones, and does not mark the "
            "assistant's. Set model.chat_template to one with {% generation %} around them, or use one row per turn with "
            "trainer.format=prompt_completion"
        )
    return template


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Truncate at the end-of-sequence token, or append it if it is missing."""
    turn, _ = _split(tokenizer, ids)
    return turn


def _split(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], list[int]]:
    """Split a turn into its tokens up to the end-of-sequence token, appended if missing, and the template's rest."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    last = max((place for place, token in enumerate(ids) if token == end), default=None)
    return ([*ids, end], []) if last is None else (ids[: last + 1], ids[last + 1 :])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    return chat.one_bos(tokenizer, list(tokenizer(text, add_special_tokens=special)["input_ids"]))
