"""A stand-in of the Hub's HTTP API on this machine: repositories are created, and commits kept in memory."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


@dataclass
class Hub:
    """What the server holds, and how it behaves."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> path -> content."""
    messages: list[str] = field(default_factory=list)
    """Messages of the commits."""
    asked: list[str] = field(default_factory=list)
    owner: str = "someone"
    refuses: dict[str, int] = field(default_factory=dict)
    """Beginning of what is asked -> status of the answer."""
    silent: str | None = None
    """What is asked so gets no answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(path)
        if hub.silent is not None and re.search(hub.silent, path):
            time.sleep(60)
            return None
        for part, status in hub.refuses.items():
            if part in path:
                return self._answer({"error": f"refused with {status}"}, status)
        if path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        return self._route(path, body)

    do_GET = do_POST

    def _route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or hub.owner}/{asked['name']}"
            known = name in hub.files
            hub.files.setdefault(name, {})
            return self._answer({"url": f"{hub.url}/{name}", "error": "exists"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if found is None or found[1] not in hub.files:
            return self._answer({"error": "Not Found"}, 404)
        if found[2] == "preupload":
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False} for x in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                hub.messages.append(line["value"]["summary"])
            if line["key"] == "file":
                hub.files[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = f"{len(hub.messages):040x}"
        return self._answer({"commitUrl": f"{hub.url}/{found[1]}/commit/{oid}", "commitOid": oid, "success": True})

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving_hub(**behaviour: Any) -> Iterator[Hub]:
    """Serve a Hub inside the block."""
    hub = Hub(**behaviour)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    server.daemon_threads, server.block_on_close = True, False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
