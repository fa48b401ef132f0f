"""The policy as a server of this machine that speaks OpenAI's chat protocol, for agents that bring their own loop.

Each episode has an address of its own. What the policy samples there is kept by the host as any other turn: token ids and
log-probs never pass through the agent, which gets and returns messages.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hf_rlhf.contract.environment import Message, Over

Ask = Callable[..., Message]
"""`ask(messages, tools=, max_tokens=, stop=)` blocks until the policy has answered; raises `Over`."""

READ = {"messages", "model", "tools", "max_tokens", "max_completion_tokens", "stop", "n", "stream", "stream_options"}
"""Fields of a request that are honoured, or that change nothing."""
HARMLESS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "modalities"}
HARMLESS |= {"prompt_cache_key", "safety_identifier", "prediction", "verbosity", "reasoning_effort"}
DEFAULTS: dict[str, Any] = {
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
}
DEFAULTS |= {"logprobs": False, "tool_choice": "auto", "response_format": {"type": "text"}}
"""Sampling arguments with the value that changes nothing. The policy samples as the recipe says, whatever a request asks for."""


class BadRequest(ValueError):
    """Raised for a request that cannot be answered; agents do not send it again."""

    def __init__(self, message: str, code: str = "invalid_request"):
        super().__init__(message)
        self.code = code


class Endpoint:
    """A server on 127.0.0.1 that starts with the first address."""

    def __init__(self) -> None:
        self.overridden: Counter[str] = Counter()
        """Number of requests that set a sampling argument to what the recipe does not say, by name."""
        self._asks: dict[str, Ask] = {}
        self._server: ThreadingHTTPServer | None = None
        self._lock = threading.Lock()

    def open(self, ask: Ask) -> str:
        """Return the base URL at which an agent talks to the policy; nobody else can guess it."""
        with self._lock:
            if self._server is None:
                self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
                self._server.daemon_threads, self._server.block_on_close = True, False
                name = "hf_rlhf-endpoint"
                threading.Thread(target=self._server.serve_forever, args=(0.05,), name=name, daemon=True).start()
            key = secrets.token_urlsafe(16)
            self._asks[key] = ask
            return f"http://127.0.0.1:{self._server.server_address[1]}/{key}/v1"

    def close(self) -> None:
        """Stop the server; open connections end with their threads."""
        with self._lock:
            self._asks.clear()
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def answer(self, key: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the completion for a request. Raises `BadRequest`."""
        ask = self._asks.get(key)
        if ask is None:
            raise BadRequest("this episode has ended", "episode_over")
        options, count = self._options(body), body.get("n") or 1
        try:
            messages = [ask(body["messages"], **options) for _ in range(count)]
        except Over:
            raise BadRequest(
                "the episode has no turns or tokens left (max_turns, max_tokens)", "context_length_exceeded"
            ) from None
        return completion(messages, str(body.get("model")))

    def _options(self, body: Mapping[str, Any]) -> dict[str, Any]:
        messages, count = body.get("messages"), body.get("n")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list of at least one message")
        if count is not None and (type(count) is not int or count < 1):
            raise BadRequest(f"n must be a whole number of at least 1, got {count!r}")
        form = body.get("response_format")
        if form not in (None, {"type": "text"}):
            raise BadRequest(f"response_format must be {{'type': 'text'}}, got {form!r:.80}: the policy samples freely")
        for name, value in body.items():
            if name not in READ | HARMLESS and value not in (None, DEFAULTS.get(name)):
                self.overridden[name] += 1
        most = body.get("max_completion_tokens", body.get("max_tokens"))
        if most is not None and (type(most) is not int or most < 1):
            raise BadRequest(f"max_tokens must be a whole number of at least 1, got {most!r}")
        stop = body.get("stop")
        return {
            "tools": body.get("tools") or None,
            "max_tokens": most,
            "stop": [stop] if isinstance(stop, str) else stop or None,
        }


def completion(messages: Sequence[Message], model: str) -> dict[str, Any]:
    """Return messages of the policy as the choices of a chat completion."""
    return {
        "id": f"chatcmpl-{secrets.token_hex(8)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": i, **_choice(message), "logprobs": None} for i, message in enumerate(messages)],
    }


def _choice(message: Message) -> dict[str, Any]:
    """Return a message, and how it ended; arguments of tool calls are JSON text there."""
    calls = [
        {
            "id": f"call_{message.get('turn', 0)}_{i}",
            "type": "function",
            "function": _as_text(call.get("function", call)),
        }
        for i, call in enumerate(message.get("tool_calls") or ())
    ]
    said = {"role": "assistant", "content": message.get("content")} | ({"tool_calls": calls} if calls else {})
    said |= {name: message[name] for name in ("reasoning_content",) if message.get(name)}
    reason = "tool_calls" if calls and message.get("finish_reason") == "stop" else message.get("finish_reason", "stop")
    return {"message": said, "finish_reason": reason}


def _as_text(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments", {})
    return {
        "name": function.get("name"),
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
    }


def chunks(whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a completion as the events of a stream: each choice's message at once, then its end."""
    shared = {name: whole[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    events = []
    for choice in whole["choices"]:
        delta, index = dict(choice["message"]), choice["index"]
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
        for part, reason in ((delta, None), ({}, choice["finish_reason"])):
            events.append(shared | {"choices": [{"index": index, "delta": part, "finish_reason": reason}]})
    return events


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Handle requests of agents."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.endswith("/v1/models"):
                self._send(
                    200, {"object": "list", "data": [{"id": "policy", "object": "model", "owned_by": "hf_rlhf"}]}
                )
            else:
                self._refuse(404, f"no GET {self.path}; use /v1/models or POST /v1/chat/completions", "not_found")

        def do_POST(self) -> None:
            try:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                key, _, path = self.path.lstrip("/").partition("/")
                if path != "v1/chat/completions":
                    self._refuse(
                        404, f"no POST /{path}; the policy answers POST /v1/chat/completions alone", "not_found"
                    )
                    return
                body = json.loads(content)
                if not isinstance(body, dict):
                    raise BadRequest(f"the request must be a JSON object, got {type(body).__name__}")
                whole = endpoint.answer(key, body)
                if body.get("stream"):
                    self._stream(chunks(whole))
                else:
                    self._send(200, whole)
            except BadRequest as error:
                self._refuse(400, str(error), error.code)
            except (ValueError, KeyError, TypeError) as error:
                self._refuse(400, f"{type(error).__name__}: {error}", "invalid_request")

        def _refuse(self, status: int, message: str, code: str) -> None:
            self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": code}})

        def _send(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, events: list[dict[str, Any]]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for event in events:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
