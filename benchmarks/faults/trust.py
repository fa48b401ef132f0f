"""Rows 16 and 48 to 52: text, files and packages that want to run code."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path
from shutil import which

from benchmarks.faults.world import CannotRun, World, expect, fault

ROOT = Path(__file__).parents[2]
PACKAGE = {
    "METADATA": "Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n",
    "entry_points.txt": "[hf_rlhf]\nrewards.hostile = hostile_rewards\n",
    "RECORD": "",
}
"""The metadata of an installed package with one entry point."""


@fault(16, "eval of what a model wrote", "have none in verifiers", trl="none; verl has two")
def _(world: World) -> str:
    names = {"eval", "exec", "compile", "__import__"}
    found = []
    for path in sorted(ROOT.glob("plugins/**/*.py")):
        if path.name == "sandbox_child.py":  # what runs inside the sandbox
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.func.id}")
    expect(not found, ", ".join(found))
    hostile = "__import__('pathlib').Path('escaped').touch()"
    rows = [{"prompt": "1+1=", "answer": "2", "completions": [hostile, rf"\boxed{{{hostile}}}", "2", "3"]}]
    world.rows(rows * 8)
    rewards = ["math_answer", "numeric", {"use": "json_schema", "schema": {"type": "object"}}]
    world.recipe(rollout={"use": "scripted", "prompts": 2, "num_generations": 4}, rewards=rewards)
    world.train("training.max_steps=1").well()
    expect(not (world.folder / "escaped").exists(), "a verifier ran it")
    return "no call of eval, exec or compile outside the sandbox; code in completions did not run"


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@fault(48, "pickled code in a checkpoint", "never run it", trl="blocks it")
def _(world: World) -> str:
    import torch

    from hf_rlhf.runtime import checkpoint_manifest

    escaped, lines = world.folder / "escaped", []
    world.train("training.save_steps=6").well()
    shutil.copytree(world.folder / "out", world.folder / "whole")
    for name in ("rlhf_state_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        shutil.rmtree(world.folder / "out")
        shutil.copytree(world.folder / "whole", world.folder / "out")
        folder = world.folder / "out" / "checkpoint-6"
        manifest = checkpoint_manifest.read_manifest(folder)
        if name == "optimizer.pt":
            (folder / name).write_bytes(pickle.dumps({"x": Evil(escaped)}))
        else:
            torch.save({"x": Evil(escaped)}, folder / name)
        kind, size = checkpoint_manifest.HASH, (folder / name).stat().st_size
        manifest["files"][name] = {
            kind: checkpoint_manifest._hash(folder / name, kind),
            "bytes": size,
        }  # as easily done
        del manifest["manifest_sha256"]
        (folder / checkpoint_manifest.MANIFEST).write_bytes(checkpoint_manifest._text(manifest))
        run = world.train("--resume", "training.save_steps=6", "training.max_steps=7")
        expect(not escaped.exists(), f"code in {name} ran")
        expect("skipping a checkpoint" not in run.text, f"{name} was not read at all:\n{run.text[-2000:]}")
        lines.append(f"{name}: {'not read' if run.code == 0 else 'refused'}")
    return ", ".join(lines)


@fault(
    49, "YAML with a Python tag, an unknown or a double key", "refuse all three", trl="takes the last of a double key"
)
def _(world: World) -> str:
    base = json.loads((world.folder / "recipe.yaml").read_text())
    plain = "\n".join(f"{key}: {json.dumps(x)}" for key, x in base.items())
    line = ""
    for more, word in (
        ("update: !!python/object/apply:os.system ['touch escaped']", "tag"),
        ("update: {mini_batchs: 2}", "mini_batchs"),
        ("update: {epochs: 1}\nupdate: {epochs: 2}", "update"),
    ):
        world.recipe()
        world.write("recipe.yaml", f"{plain}\n{more}\n")
        run = world.train().refused()
        expect(word in run.text, f"{word!r} is not named:\n{run.text}")
        line = run.line("error:")
    expect(not (world.folder / "escaped").exists(), "a tag ran code")
    return line


@fault(50, "recipe sets the environment", "refuse it", trl="sets PATH and LD_PRELOAD")
def _(world: World) -> str:
    world.recipe(env={"LD_PRELOAD": "evil.so"})
    return world.train().refused().line("env")


@fault(51, "hostile installed package", "import it only where it is named", trl="no plugins")
def _(world: World) -> str:
    for name, text in PACKAGE.items():
        world.write(f"site/hostile-1.0.dist-info/{name}", text)
    world.write("site/hostile_rewards.py", "open('escaped', 'w').close()\nraise RuntimeError('hostile')")
    path = str(world.folder / "site")
    world.train(PYTHONPATH=path).well()
    listed = world.run("plugins", PYTHONPATH=path).well()
    expect("hostile" in listed.text, "it is not listed")
    expect(not (world.folder / "escaped").exists(), "it was imported")
    world.recipe(rewards=["hostile"])
    return world.train(PYTHONPATH=path).refused().line("hostile 1.0", "RuntimeError")


ESCAPES = [
    "raise SystemExit(0)",
    "class Equal:\n    def __eq__(self, other): return True\ndef double(x): return Equal()",
    "print(open('/etc/shadow').read())\ndef double(x): return 2 * x",
    "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\ndef double(x): return 2 * x",
    "import os\nif os.fork() == 0:\n    import time; time.sleep(600)\ndef double(x): return 2 * x + 1",
]


@fault(52, "code in completions wants out", "run it in a sandbox, judge it outside", trl="no sandbox")
def _(world: World) -> str:
    if which("bwrap") is None:
        raise CannotRun("bwrap is not installed")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        texts = [code.replace("{port}", str(server.getsockname()[1])) for code in ESCAPES]
        texts += ["def double(x): return 2 * x"]
        tests = [{"call": "double(4)", "expected": 8}, {"call": "double(7)", "expected": 14}]
        world.rows([{"prompt": "double", "answer": "", "tests": json.dumps(tests), "completions": texts}] * 8)
        rollout = {"use": "scripted", "prompts": 1, "num_generations": 6}
        world.recipe(rollout=rollout, rewards=["unit_tests"])
        world.train("training.max_steps=1").well()
        server.settimeout(0.2)
        try:
            server.accept()
            reached = True
        except TimeoutError:
            reached = False
    expect(not reached, "a program reached a server outside")
    (mean,) = world.logged("reward/unit_tests/mean")
    expect(abs(mean - 1 / 6) < 1e-6, f"mean score {mean} instead of 1/6")
    return "of six programs only the right one scores; no file, connection or process outside"
