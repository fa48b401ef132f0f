"""Conversations as text: every rendering of a chat template, checked so that no message's text is lost.

Lists of text parts become texts. Where a template reads lists only, texts become parts. A template that drops reasoning from
assistant turns is replaced by TRL's training version of it where text is learned or scored; other losses are errors.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message with its reasoning."""
TOOL_ROLES = ("tool", "ipython", "function")
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
_ESCAPE = re.compile(r"\\+[nrt]?")
_OPEN_TAG = re.compile(r"(?:<[A-Za-z][\w.:-]*>|\[THINK\])\s*\Z")
_TEXT_PARTS = ("text", "input_text", "output_text", None)


class ChatError(ValueError):
    """A conversation that is invalid, that the chat template refuses, or that loses text in it."""


class Conversation(NamedTuple):
    """Messages, and how their rendering ends."""

    messages: Messages
    end: Literal["complete", "answer", "open"] = "complete"
    """`complete`: after the last message; `answer`: at the start of the assistant's turn; `open`: inside the last message."""


@dataclass(frozen=True)
class Chat:
    """Rendering of conversations by a tokenizer's chat template, or by `template` in its place."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    empty: str | None = None
    """Content of a message that only calls tools."""
    parts: bool = False
    """Hand contents to the template as lists of one text part."""
    arguments: Literal["mapping", "text"] | None = None
    """Form in which the template gets the arguments of tool calls: a mapping, or its JSON text; None: as they are."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the template shows."""

    def text(self, conversation: Conversation) -> str:
        """Render a conversation. Raises `ChatError` with the template's words where it refuses, or naming the text it drops."""
        text = str(self.apply(conversation, tokenize=False))
        if lost := _lost(conversation.messages, text):
            raise ChatError(f"the chat template drops {lost}. {FIX}")
        return text

    def apply(self, conversation: Conversation, **options: Any) -> Any:
        """Call the tokenizer's `apply_chat_template`. Raises `ChatError` with the template's words where it refuses."""
        messages, end = conversation
        try:
            return self.tokenizer.apply_chat_template(
                [self._formed(message) for message in messages],
                chat_template=self.template,
                add_generation_prompt=end == "answer",
                continue_final_message=end == "open",
                tools=self.tools,  # type: ignore[arg-type]  # list is invariant
                **options,
                **template_kwargs(self.tokenizer),
            )
        except Exception as error:  # templates are code, which may raise anything
            words = str(error) if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {error}"
            raise ChatError(f"the chat template refuses the conversation: {words:.300}") from error

    def _formed(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        content = self.empty if content is None else content
        formed = {**message, "content": [{"type": "text", "text": content}] if self.parts and content else content}
        if self.arguments and message.get("tool_calls"):
            formed["tool_calls"] = [_with_arguments(call, self.arguments) for call in message["tool_calls"]]
        return formed


FIX = (
    "Remove it from the dataset, or use a template that keeps it: for the policy set model.chat_template, for a reward model "
    "save its tokenizer with one"
)


def chat_of(
    tokenizer: PreTrainedTokenizerBase,
    *conversations: Conversation,
    training: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> Chat:
    """Return the first rendering in which all conversations keep their text. Raises `ChatError` if there is none.

    `training`: also try TRL's training version of the template, which keeps reasoning. `tools`: schemas that it shows.
    """
    return _first(tokenizer, conversations, training, tools)[0]


def render(tokenizer: PreTrainedTokenizerBase, *conversations: Conversation, training: bool = False) -> list[str]:
    """Render conversations in one way that keeps the text of all (see `chat_of`)."""
    return _first(tokenizer, conversations, training)[1]


def _first(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    training: bool,
    tools: list[dict[str, Any]] | None = None,
) -> tuple[Chat, list[str]]:
    if not tokenizer.chat_template:
        raise ChatError("conversations need a tokenizer with a chat template. Set model.chat_template")
    problem: ChatError | None = None
    for chat in _candidates(tokenizer, conversations, training):
        chat = replace(chat, tools=tools)
        try:
            return chat, [chat.text(conversation) for conversation in conversations]
        except ChatError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def template_kwargs(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the recipe's `model.chat_template_kwargs`, which its tokenizers carry."""
    return getattr(tokenizer, "chat_template_kwargs", None) or {}


_TRAINING: dict[str, str | None] = {}


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's training version of the chat template: it keeps reasoning, and marks the assistant's text. None if unknown."""
    from trl import get_training_chat_template

    if (template := str(tokenizer.chat_template)) not in _TRAINING:  # TRL takes longer than a row's rendering
        try:
            _TRAINING[template] = get_training_chat_template(tokenizer)
        except Exception:  # it renders examples, which a template may refuse
            _TRAINING[template] = None
    return _TRAINING[template]


def _candidates(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], training: bool
) -> Iterator[Chat]:
    yield Chat(tokenizer)
    if any(message.get("tool_calls") for messages, _ in conversations for message in messages):
        yield Chat(tokenizer, empty="")
        yield Chat(tokenizer, empty="", arguments="mapping")
        yield Chat(tokenizer, empty="", arguments="text")
    yield Chat(tokenizer, empty="", parts=True)
    if training and (template := training_template(tokenizer)) is not None:
        yield Chat(tokenizer, template)
        yield Chat(tokenizer, template, empty="", arguments="mapping")


def messages_of(given: Any, name: str) -> Messages:
    """Return messages with text contents and without null fields. Raises `ChatError` for anything else, images included.

    The content of a message that only calls tools is None.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ChatError(f"{name} must be a text or a list of messages with role and content, got {given!r:.80}")
    return [_message(message, f"{name}, message {place}") for place, message in enumerate(given, start=1)]


def _message(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or "role" not in given:
        raise ChatError(f"{name}: must have role and content, got {given!r:.80}")
    message = {key: value for key, value in given.items() if value is not None}
    content = message.get("content")
    if content is None:
        content = None if message.get("tool_calls") else ""
    elif not isinstance(content, str | Mapping):
        content = _joined(list(content), message["role"], name)
    return {**message, "content": content}


def _joined(parts: list[Any], role: str, name: str) -> Any:
    """Return the text of a list of text parts. A tool's result may be any list."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind in _TEXT_PARTS and isinstance(text, str):
            texts.append(text)
        elif role in TOOL_ROLES:
            return parts
        else:
            raise ChatError(
                f"{name}: content must be text or text parts, got a part of type {kind!r}. Models are trained on text alone: "
                "remove the part, or put it into words"
            )
    return "".join(texts)


def opening_of(prompt: str) -> str:
    """Return the tag that a prompt leaves open at its end, such as "<think>\\n"; empty without one."""
    found = _OPEN_TAG.search(prompt)
    return found.group() if found else ""


def one_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return tokens without a second BOS (or [CLS]) at the start, which a text that begins with one would get."""
    starts = {token for token in (tokenizer.bos_token_id, tokenizer.cls_token_id) if token is not None}
    while len(ids) > 1 and ids[0] == ids[1] and ids[0] in starts:
        ids = ids[1:]
    return ids


def _lost(messages: Messages, text: str) -> str | None:
    """Describe the first text of a message that does not occur in a rendering; None if all do.

    Whitespace does not count, nor escapes, nor an empty <think></think>. Longer texts are sought first, and each takes its
    place, so that a text occurs once for each message that has it.
    """
    pieces = [(place, piece) for place, message in enumerate(messages, start=1) for piece in _pieces(message)]
    rest = squeezed(text)
    for place, piece in sorted(pieces, key=lambda piece: -len(piece[1])):
        if (form := squeezed(piece)) not in rest and (form := squeezed(EMPTY_THOUGHT.sub("", piece))) not in rest:
            return f"part of message {place} ({messages[place - 1]['role']}): {piece.strip()!r:.80}"
        rest = rest.replace(form, "\0", 1)
    return None


def _pieces(message: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a message: content, reasoning, and the names and arguments of tool calls."""
    yield from _texts(message["content"])
    yield from dict.fromkeys(text for name in REASONING for text in _texts(message.get(name)))
    for call in message.get("tool_calls") or ():
        function = function_of(call)
        yield from _texts(function.get("name"))
        yield from _texts(parsed_arguments(function.get("arguments")))


def function_of(call: Any) -> Mapping[str, Any]:
    """Return the name and arguments of a tool call, which may be nested under `function`."""
    return call.get("function", call) if isinstance(call, Mapping) else {}


def parsed_arguments(arguments: Any) -> Any:
    """Return the arguments of a tool call, parsed where they are JSON text."""
    with contextlib.suppress(ValueError, TypeError):
        return json.loads(arguments)
    return arguments


def _with_arguments(call: Mapping[str, Any], form: Literal["mapping", "text"]) -> dict[str, Any]:
    function = function_of(call)
    arguments = parsed_arguments(function.get("arguments"))
    parsed = {**function, "arguments": arguments if form == "mapping" else json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": parsed} if "function" in call else parsed


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def squeezed(text: str) -> str:
    """Return a text without whitespace and escapes, raw or as in JSON."""
    return "".join((_ESCAPE.sub("", text) if "\\" in text else text).split())
