"""Rows 44 to 46: Weights & Biases without a key, out of reach, and killed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

from benchmarks.faults.world import CannotRun, World, expect, fault

WANDB = {"report_to": "wandb"}
KILLS = """
import os

calls = 0

def score(completions):
    global calls
    calls += 1
    if calls == 3:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                command = open(f"/proc/{pid}/cmdline").read().split("\\0")
            except OSError:
                continue
            if "wandb-core" in command[0] and str(os.getpid()) in command:
                os.kill(int(pid), 9)
                print("killed wandb-core")
    return [len(set(text)) / 8 for text in completions]
"""


@contextmanager
def silent_later() -> Iterator[str]:
    """Serve what starts a run of W&B, and then accept requests without an answer. Yields the address."""
    started, ended = threading.Event(), threading.Event()
    own = {"id": "1", "name": "run", "project": {"name": "project", "entity": {"name": "me"}}}

    class Answer(BaseHTTPRequestHandler):
        """Answer the requests until a run has started."""

        def do_POST(self) -> None:
            if started.is_set():
                ended.wait()
                return
            query = self.rfile.read(int(self.headers["Content-Length"]))
            if b"upsertBucket" in query:
                started.set()
            found = {"upsertBucket": {"bucket": own, "inserted": True}} if started.is_set() else {}
            answer = json.dumps({"data": found}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        ended.set()
        server.shutdown()
    expect(started.is_set(), "W&B did not start a run")


def tracked(world: World, **environment: str) -> str:
    """Train with W&B as `environment` says. All steps must be in metrics.jsonl."""
    if find_spec("wandb") is None:
        raise CannotRun("wandb is not installed")
    world.recipe(training=WANDB)
    run = world.train(**environment).well()
    expect(len(world.entries()) == 6, f"{len(world.entries())} of 6 steps were logged")
    return run.text


@fault(44, "W&B without a key", "log offline", trl="UsageError at the start")
def _(world: World) -> str:
    text = tracked(world)
    expect("offline" in text, f"nothing was said:\n{text[-2000:]}")
    expect(list((world.folder).rglob("offline-run-*")), "no offline run is left")
    return next(line for line in text.splitlines() if "offline" in line)


@fault(45, "W&B out of reach", "log offline within 10 s", trl="waits 101 s, then dies")
def _(world: World) -> str:
    world.recipe()
    quiet = world.train("--save_strategy", "no").well().seconds
    key = "a" * 40
    found = []
    with socket.create_server(("127.0.0.1", 0)) as silent, silent_later() as later:
        nobody = silent.getsockname()[1]  # the kernel accepts connections, nobody reads them
        for address in ("http://127.0.0.1:9", f"http://127.0.0.1:{nobody}", later):
            world.recipe(training=WANDB)
            run = world.train("--save_strategy", "no", WANDB_BASE_URL=address, WANDB_API_KEY=key).well()
            found.append(run.seconds - quiet)
            expect(len(world.entries()) == 6, "steps are missing")
            expect("wandb sync" in run.text, "how to upload the run was not said")
            expect("Traceback" not in run.text, run.text[-2000:])
    expect(max(found) < 10 * world.patience, f"it cost {found} s")
    parts = zip(("refused", "never answered", "silent after the start"), found, strict=True)
    return "seconds more than without W&B: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts)


@fault(46, "the process of W&B dies", "go on", trl="ConnectionResetError")
def _(world: World) -> str:
    world.write("reward.py", KILLS)
    text = tracked(world, WANDB_MODE="offline")
    expect("killed wandb-core" in text, "it was not killed")
    return "six steps, all in metrics.jsonl"
