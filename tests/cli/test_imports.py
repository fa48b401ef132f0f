"""What is imported, and how long it takes, in interpreters that have imported nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.waits import scaled


def fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=scaled(120)
    ).stdout


@pytest.mark.parametrize("command", [["plugins"], ["recipes"], ["recipes", "show", "grpo"], ["--version"]])
def test_listing_imports_neither_torch_nor_a_plugin_and_is_fast(command, tmp_path):
    code = f"""
import resource, sys
from hf_rlhf.cli.main import main
sys.argv = ["hf-rlhf", *{command!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "transformers", "datasets", "numpy", "trl"}}
plugins = [name for name in sys.modules if name.startswith(("hf_rlhf_plugins", "hf_rlhf_recipes"))]
used = resource.getrusage(resource.RUSAGE_SELF)
print("IMPORTED", sorted(heavy & set(sys.modules)) + plugins)
print("SECONDS", used.ru_utime + used.ru_stime)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "IMPORTED []" in done.stdout
    assert float(done.stdout.rpartition("SECONDS")[2]) < 1.0


def test_a_run_of_one_step_takes_at_most_five_seconds_of_cpu(tmp_path):
    command = ["-m", "hf_rlhf", "train", "quickstart", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    fresh_python(f"""
import os, subprocess, sys
subprocess.run([sys.executable, *{command!r}], check=True, stdout=subprocess.DEVNULL)
used = os.times()
assert used.children_user + used.children_system <= 5.0, used
""")


def test_nothing_heavy_is_imported_with_a_verifier():
    names = ["choice", "constraints", "exact_match", "format", "json_schema", "language", "length", "math_answer"]
    names += ["numeric", "regex", "repetition"]
    loaded = fresh_python(
        f"import importlib, json, sys\nfor name in {names}: importlib.import_module('hf_rlhf_plugins.rewards.' + name)\n"
        "print(json.dumps([m for m in ('torch', 'transformers', 'sympy', 'jsonschema', 'py3langid') if m in sys.modules]))"
    )
    assert json.loads(loaded) == []
