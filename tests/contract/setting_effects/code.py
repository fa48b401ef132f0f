"""Two values of each setting of `unit_tests`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hf_rlhf import load_plugin
from hf_rlhf.config.recipe_yaml import RecipeError
from hf_rlhf.testing import rollouts
from hf_rlhf_plugins.rewards._sandbox.backend import Limits, SandboxError
from hf_rlhf_plugins.rewards._sandbox.server import serve
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers.sandboxes import bubblewrap

FENCED = "It is\n```python\ndef f(x): return x * x\n```\n"
BARE = "def f(x): return x * x"
TESTS = [["assert f(2) == 4", "assert f(3) == 8", "assert f(1) == 1.05"]] * 2
OTHER = [["assert f(3) == 8"]] * 2
HARMLESS = {"sandbox": "rlimits", "i_understand_this_is_not_a_sandbox": True}


def scored(program: str | None = None, test: str | None = None, **settings: Any) -> list[Any]:
    """The scores of a fenced and a bare program, or of one with one test."""
    bubblewrap()
    texts = [FENCED, BARE] if program is None else [program]
    tests = TESTS if test is None else [[test]]
    return list(
        load_plugin("rewards", "unit_tests", **settings)(
            rollouts(texts, columns={"tests": tests, "other": OTHER[:1] * len(texts)})
        )
    )


def effect(setting: str, first: Any, second: Any, program: str | None = None, test: str | None = None) -> None:
    EFFECTS[f"rewards.unit_tests.{setting}"] = SettingEffect(
        first, second, lambda folder, value: scored(program, test, **{setting: value})
    )


def showing(
    setting: str, first: Any, second: Any
) -> Callable[[Callable[[Path, Any], Any]], Callable[[Path, Any], Any]]:
    def enter(show: Callable[[Path, Any], Any]) -> Callable[[Path, Any], Any]:
        EFFECTS[f"rewards.unit_tests.{setting}"] = SettingEffect(first, second, show)
        return show

    return enter


SLEEP = "import time\ndef f():\n  time.sleep(1.5)\n  return 1"
FORK = "import os\ndef f():\n  if os.fork() == 0: os._exit(0)\n  return 1"
FILL = "def f():\n  with open('/tmp/x', 'wb') as x: return x.write(bytes(2 << 20)) and 1"
effect("column", "tests", "other")
effect("score", "share", "all")
effect("without_fence", "whole", "fail")
effect("tolerance", 1e-6, 0.1)
effect("time_limit", 10.0, 0.5, SLEEP, "assert f() == 1")
effect("test_time_limit", 5.0, 0.5, SLEEP, "assert f() == 1")
effect("program_memory_mib", 512, 256, "def f(): return bytearray(300 << 20) and 1", "assert f() == 1")
effect("processes", 8, 1, FORK, "assert f() == 1")
effect("disk_mib", 32, 1, FILL, "assert f() == 1")
effect("output_kib", 1024, 1, "def f(): return 'x' * 2000", f"assert f() == {'x' * 2000!r}")
effect("python", None, sys.executable, "import annotated_types\ndef f(): return 1", "assert f() == 1")


@showing("sandbox", "bubblewrap", "rlimits")
def what_a_program_sees(folder: Path, sandbox: str) -> Any:
    (folder / "secret").write_text("93")
    settings = HARMLESS if sandbox == "rlimits" else {"sandbox": sandbox}
    return scored(f"def f(): return open({str(folder / 'secret')!r}).read()", "assert f() == '93'", **settings)


@showing("i_understand_this_is_not_a_sandbox", False, True)
def whether_it_runs(folder: Path, understood: bool) -> Any:
    try:
        return scored(sandbox="rlimits", i_understand_this_is_not_a_sandbox=understood)
    except RecipeError as error:
        return str(error)


@showing("image", None, "mine:1")
def the_command(folder: Path, image: str | None) -> Any:
    return load_plugin("rewards", "unit_tests", sandbox="docker", image=image).backend.command(Limits(), "name")


def of_runner(token_env: str | None, listening: bool = True) -> Any:
    """The scores that a runner with a token gives, or that it gives none."""
    with serve("127.0.0.1", 0, "open-sesame", 1, bubblewrap()) as server, patch.dict(os.environ, RUNNER="open-sesame"):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        host, port = server.server_address[:2]
        url = f"http://{host!s}:{port if listening else 9}"
        try:
            return scored(sandbox="remote", url=url, token_env=token_env)
        except SandboxError:
            return "no runner"
        finally:
            server.shutdown()
            thread.join()


EFFECTS["rewards.unit_tests.token_env"] = SettingEffect(None, "RUNNER", lambda folder, value: of_runner(value))
EFFECTS["rewards.unit_tests.url"] = SettingEffect(True, False, lambda folder, value: of_runner("RUNNER", value))
