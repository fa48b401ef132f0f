"""Random overrides of recipes: each is accepted, or refused with a reason; accepted ones train.

`python -m benchmarks.fuzz [--overrides 10000] [--runs 100] [--seed 0]`

An override writes a random value, of the right type or not, to a random key of a shipped recipe, or to a misspelt one.
Whatever is not accepted must be refused by a `UserError`: any other exception is a crash. Overrides of a small recipe that
`check` accepts are then trained for two optimizer steps, which must end well or by an error that names its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.world import RECIPE, World
from hf_rlhf import load_recipe
from hf_rlhf.axes import AXES
from hf_rlhf.config.overrides import apply_overrides
from hf_rlhf.config.recipe import read_recipe, resolve
from hf_rlhf.registry.host import get_host
from hf_rlhf.registry.settings_schema import settings_of
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.scoring.scorer import RewardError

SMALL = [0, 1, 2, 3, 4, -1, 0.0, 0.1, 0.5, 1.0, 1.5, -0.5, 1e-8, True, False, None, "none", "auto"]
"""Values that no run grows large by."""
ODD = [
    10**9,
    10**30,
    -(10**9),
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    " ",
    "x",
    "1e-3",
    "[",
    "{",
    "}: {",
    "#",
    "é\n",
]
ODD += [
    "!!python/name:os.system",
    "&a",
    "*a",
    "~",
    "null",
    "yes",
    "2026-11-30",
    "0x1f",
    "{use: }",
    "{use: nothing}",
    "[1, [2]]",
]
ODD += [
    "{a: {b: {c: 1}}}",
    "[]",
    "{}",
    "[null]",
    "{use: group_norm}",
    "k3",
    "../..",
    "https://[",
    "\x00",
    "\ud800",
    "a" * 5000,
]


def keys(raw: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of everything in a recipe, and of the settings that its plugins have and it leaves out."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            yield f"{path}{key}"
            yield from keys(value, f"{path}{key}.")
    elif isinstance(raw, list):
        for i, value in enumerate(raw):
            yield f"{path}{i}"
            yield from keys(value, f"{path}{i}.")
        yield f"{path}{len(raw)}"


def plugin_settings(raw: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted paths of the settings of a recipe's plugins, also of those that it leaves out."""
    for axis in AXES:
        chosen = raw.get(axis)
        for i, choice in enumerate(chosen if isinstance(chosen, list) else [chosen]):
            name = choice.get("use") if isinstance(choice, dict) else choice
            if isinstance(name, str):
                place = f"{axis}.{i}" if isinstance(chosen, list) else axis
                for field in settings_of(get_host().get(axis, name)):
                    yield f"{place}.{field.name}"


def misspelt(key: str, draw: random.Random) -> str:
    """Return a key with a character lost, doubled or replaced."""
    at = draw.randrange(len(key))
    return key[:at] + draw.choice(["", key[at] * 2, ".", "x", "=", "é"]) + key[at + 1 :]


def overrides(known: list[str], draw: random.Random, values: list[Any]) -> list[str]:
    """Return one to three overrides."""
    found = []
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(known)
        key = misspelt(key, draw) if draw.random() < 0.1 else key
        value = draw.choice(values)
        found.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return found


def fuzz(count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Apply `count` random sets of overrides to shipped recipes. Returns how many were accepted, and the crashes."""
    draw = random.Random(seed)
    names = [offer.name for offer in get_host().recipes() if offer.package == "hf_rlhf"]
    raw = {name: read_recipe(name) for name in names}
    known = {name: sorted({*keys(raw[name]), *plugin_settings(raw[name])}) for name in names}
    accepted, crashes = 0, []
    for _ in range(count):
        name = draw.choice(names)
        given = overrides(known[name], draw, SMALL + ODD)
        try:
            recipe = load_recipe(name, given)
            recipe.training_arguments("outputs")
            accepted += 1
        except UserError as error:
            if not str(error).strip():
                crashes.append(f"{name} {given}: refused without a word")
        except Exception as error:
            crashes.append(f"{name} {given}: {type(error).__name__}: {error}"[:400])
    return accepted, crashes


def train_accepted(count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Train random recipes that `check` accepts, `count` of them. Returns how many ended well, and the crashes."""
    from hf_rlhf.cli.runs import run

    draw, tried, ended_well, crashes = random.Random(seed), 0, 0, []
    quiet = {"max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    while tried < count:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            World(folder)
            base = {**RECIPE, "training": {**RECIPE["training"], **quiet}}
            base["model"], base["dataset"] = (
                {"path": f"{folder}/model"},
                {"path": f"{folder}/problems.jsonl", "held_out": 2},
            )
            base["rewards"] = [{"use": "function", "function": f"{folder}/reward.py:score"}, {"use": "exact_match"}]
            base["kl"] = [{"use": "in_loss", "beta": 0.1, "estimator": {"use": "k3"}}]
            base["reference"] = {"use": "frozen"}
            known = sorted({*keys(base), *plugin_settings(base)} - {"training.use_cpu", "training.max_steps"})
            given = overrides(known, draw, SMALL)
            try:
                recipe = resolve(apply_overrides(base, given)[0])
                run.check(recipe, f"{folder}/out", forecast=False)
            except UserError:
                continue
            tried += 1
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    run.train(recipe, f"{folder}/out")
                ended_well += 1
            except (UserError, RewardError, FloatingPointError) as error:
                if not str(error).strip():
                    crashes.append(f"{given}: {type(error).__name__} without a word")
            except Exception as error:
                crashes.append(f"{given}: {type(error).__name__}: {error}"[:400])
    return ended_well, crashes


def main() -> int:
    """Fuzz and train. Return 1 if anything crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overrides", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    accepted, crashes = fuzz(asked.overrides, asked.seed)
    print(f"{asked.overrides} sets of overrides: {accepted} accepted, {len(crashes)} crashes")
    well, failed = train_accepted(asked.runs, asked.seed)
    print(f"{asked.runs} accepted recipes trained: {well} ended well, {len(failed)} crashes")
    print("\n".join(crashes + failed))
    return int(bool(crashes or failed))


if __name__ == "__main__":
    sys.exit(main())
