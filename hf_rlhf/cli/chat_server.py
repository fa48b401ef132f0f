"""The HTTP endpoint behind `hf-rlhf chat`: one model in this process, answering transformers' own chat on this machine.

It speaks the part of OpenAI's protocol that transformers' chat uses. Conversations are rendered as prompts in training are; a
model without a chat template continues the last message.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hf_rlhf.contract import chat

Chunk = tuple[str, str | None, int]
"""Text, the finish reason at the end, and how many tokens were sampled so far."""
FLOATS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
"""Settings of `generate`, which takes no whole number for them; transformers' chat reads `temperature=2` as one."""


class Answering:
    """A model that continues conversations, one at a time."""

    def __init__(self, model: Any, tokenizer: Any, skip_special_tokens: bool = True):
        self.model, self.tokenizer, self.skip_special_tokens = model, tokenizer, skip_special_tokens
        self._one = threading.Lock()

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a conversation that the model answers, or without a chat template of its last message."""
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(str(messages[-1]["content"]))["input_ids"])
        text = chat.render(
            self.tokenizer, chat.Conversation(chat.messages_of(list(messages), "the conversation"), "answer")
        )[0]
        return chat.one_bos(self.tokenizer, self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterator[Chunk]:
        """Yield the answer piece by piece, or the text of an error; the conversation can continue after it."""
        try:
            with self._one:
                yield from self._sample(self.prompt(messages), settings)
        except Exception as error:
            yield f"[{type(error).__name__}: {error}]", "stop", 0

    def _sample(self, ids: list[int], settings: Mapping[str, Any]) -> Iterator[Chunk]:
        import torch
        from transformers import GenerationConfig, TextIteratorStreamer

        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if context is None else context - len(ids)
        if room is not None and room < 1:
            yield f"[the conversation has {len(ids)} tokens, the model's context {context}: !clear]", "stop", 0
            return
        typed = {name: float(x) if name in FLOATS else x for name, x in settings.items() if x is not None}
        config = GenerationConfig(**typed)
        own = self.model.generation_config.eos_token_id
        ends = {own} if isinstance(own, int) else set(own or ())
        config.eos_token_id = sorted(ends | {self.tokenizer.eos_token_id})
        config.pad_token_id = self.tokenizer.pad_token_id
        if room is not None:
            config.max_new_tokens = min(config.max_new_tokens or 256, room)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=self.skip_special_tokens)
        tokens = torch.tensor([ids], device=self.model.device)
        found: list[Any] = []

        def generate() -> None:
            try:
                inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                found.append(self.model.generate(**inputs, generation_config=config, streamer=streamer)[0].tolist())
            except Exception as error:
                found.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        for text in streamer:
            yield text, None, 0
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        sampled = found[0][len(ids) :]
        yield "", "stop" if sampled and sampled[-1] in config.eos_token_id else "length", len(sampled)


@contextmanager
def serving(answering: Answering) -> Iterator[str]:
    """Answer requests on a free port of this machine inside the block; its address is returned."""

    class Handler(BaseHTTPRequestHandler):
        """Handle a request of the chat."""

        protocol_version = "HTTP/1.0"  # the end of the connection is the end of a stream

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            if self.path.endswith("/load_model"):
                self._event({"status": "ready", "cached": True})
                return
            settings = json.loads(body.get("generation_config") or "{}")
            for text, reason, count in answering.answer(body["messages"], settings):
                self._event(_chunk(str(body.get("model")), text, reason, count))
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, value: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
            self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def _chunk(model: str, text: str, reason: str | None, count: int) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": reason}
    made = {"id": "chat", "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    made |= {"choices": [choice]}
    usage = {"prompt_tokens": 0, "completion_tokens": count, "total_tokens": count}
    return made | ({"usage": usage} if reason else {})
