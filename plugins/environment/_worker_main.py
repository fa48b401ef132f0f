"""Worker process of tools: frames of bytes in, lines of JSON out.

The first frame is JSON with import paths and functions by name, as texts `file.py:name`, or for functions themselves as their
pickle; then one frame for each call. The output is {"ready": true} or {"broken": text}, then one line for each call.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import struct
import sys
from typing import Any, BinaryIO


def read(stream: BinaryIO) -> bytes | None:
    """Read a frame; None at the end."""
    head = stream.read(8)
    return stream.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None


def main() -> None:
    """Serve until the input ends."""
    frames, lines = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        lines.write(json.dumps(value) + "\n")
        lines.flush()

    header = json.loads(read(frames) or b"{}")
    sys.path[:] = header["path"]
    try:
        from hf_rlhf_plugins._functions import load_function
        from hf_rlhf_plugins.environment._calls import as_text, in_words, is_infrastructure

        functions = {
            name: load_function(given, "tool") if kind == "path" else pickle.loads(base64.b64decode(given))  # noqa: S301
            for name, (kind, given) in header["functions"].items()
        }
    except BaseException as error:
        say({"broken": f"{type(error).__name__}: {error}"})
        raise
    say({"ready": True})
    while (frame := read(frames)) is not None:
        name, arguments = json.loads(frame)
        try:
            say({"text": as_text(functions[name](**arguments))})
        except Exception as error:
            say({"error": in_words(error).removeprefix("error: "), "infrastructure": is_infrastructure(error)})


if __name__ == "__main__":
    main()
