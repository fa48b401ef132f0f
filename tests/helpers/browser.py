"""Pages in headless Chromium, driven by the DevTools protocol over a pipe: console errors, requests, pictures, values."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.helpers.waits import scaled

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


def program() -> str:
    """The path of Chromium, or a skip where it is missing; in CI (`CI=true`) it must be there."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium: `make chromium` installs it")
    assert found is not None, "CI needs Chromium: `make chromium` installs it"
    return found


class Page:
    """One tab. `errors` are console errors and exceptions of the page, `requests` the addresses it asked for beside itself."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._rest, self._number = read, write, b"", 0
        self._session = ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._address = ""
        self._loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, address: str | Path) -> float:
        """Open a file or an address; returns the seconds until its `load` event."""
        self._address = address.resolve().as_uri() if isinstance(address, Path) else address
        self.errors, self.requests, self._loaded = [], [], False
        started = time.perf_counter()
        answer = self._call("Page.navigate", url=self._address)
        assert "errorText" not in answer, answer
        while not self._loaded:
            self._event()
        return time.perf_counter() - started

    def view(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Set the size of the window in CSS pixels, and whether the reader prefers a dark page."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; of a promise, what it resolves to."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def type(self, selector: str, text: str) -> None:
        """Type text into a field, as a reader does."""
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self._call("Input.insertText", text=text[:-1])
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=text[-1], text=text[-1] if kind == "keyDown" else "")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of what is in the window."""
        clip = {}
        if whole:
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        picture = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(picture["data"]))

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than its window."""
        return self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._write, rest) :]
        while True:
            answer = self._event()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']['message']}"
                return answer["result"]

    def _event(self) -> dict[str, Any]:
        """Read one message, and note what it tells of the page."""
        until = time.monotonic() + scaled(30)
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        told = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "assert"):
                self.errors.append(" ".join(str(x.get("value", x.get("description"))) for x in told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.errors.append(told["entry"]["text"])
            case "Network.requestWillBeSent":
                address = told["request"]["url"]
                if address.partition("#")[0] != self._address.partition("#")[0] and not address.startswith("data:"):
                    self.requests.append(address)
        return message


@contextmanager
def browser(width: int = 1400, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """A page of a Chromium of its own, which ends with the block."""
    path = program()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The program reads from its file 3 and writes to its file 4.
        (its_read, our_write), (our_read, its_write) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (its_read, its_write)]
        errors = os.open(os.devnull, os.O_WRONLY)
        pid = os.posix_spawn(
            path,
            [path, *FLAGS, f"--user-data-dir={profile}"],
            {**os.environ, "HOME": profile},
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(high, (3, 4), strict=True)),
                (os.POSIX_SPAWN_DUP2, errors, 2),
            ],
            setpgroup=0,
        )
        for end in (its_read, its_write, *high, errors):
            os.close(end)
        try:
            page = Page(our_read, our_write)
            page.view(width, height, dark)
            yield page
        finally:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(our_read)
            os.close(our_write)
