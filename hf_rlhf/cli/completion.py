"""Candidates for Typer's shell completion: recipes, axes, plugins, overrides and flags, without importing torch or a plugin.

`hf-rlhf --install-completion` sets it up. Where nothing fits, the shell offers files. Settings of a plugin are read from its
source.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from hf_rlhf.axes import AXES, LISTS, NESTED
from hf_rlhf.cli.flags import FLAGS, WithSamples
from hf_rlhf.registry.discovery import source_of
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.errors import UserError

VARIABLE = "_HF_RLHF_COMPLETE"


def run(app: typer.Typer) -> None:
    """Run the command line, or answer a shell.

    bash splits `advantages.use=g` into three words and replaces only the last, so the first two are joined before Typer
    reads the line and cut off its answers.
    """
    if os.environ.get(VARIABLE) != "complete_bash":
        app(prog_name="hf-rlhf")
        return
    cut = _join_words()
    answers = io.StringIO()
    try:
        with contextlib.redirect_stdout(answers):
            app(prog_name="hf-rlhf")
    finally:
        for line in answers.getvalue().splitlines():
            if len(line) > cut:
                print(line[cut:])


def _join_words() -> int:
    """Join in the environment what bash split at `=`. Return how much of the current word is on its line already."""
    words, number = os.environ.get("COMP_WORDS", "").split(), int(os.environ.get("COMP_CWORD", "0"))
    words += [""] * (number + 1 - len(words))
    joined: list[str] = []
    for i, word in enumerate(words[: number + 1]):
        if i > 1 and (word == "=" or joined[-1].endswith("=")):
            joined[-1] += word
        else:
            joined.append(word)
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = " ".join(joined), str(len(joined) - 1)
    return joined[-1].rfind("=") + 1


class WithFlags(WithSamples):
    """A command that takes every field of TrainingArguments as a flag."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Return the command's own options and the flags."""
        items: list[Any] = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("--"):
            known = {item.value for item in items}
            words = dict.fromkeys(f"--{name}" for name in [*FLAGS, "use_peft", *training_arguments()])
            items += [_item(word) for word in _starting(words, incomplete) if word not in known]
        return items


def _item(word: str) -> Any:
    try:
        made: Any = importlib.import_module("typer._click.shell_completion")
    except ImportError:  # older Typer uses click
        made = importlib.import_module("click.shell_completion")
    return made.CompletionItem(word)


# Arguments


def recipe_names(incomplete: str) -> list[str]:
    """Return recipes."""
    usable = [recipe for recipe in get_host().recipes() if not recipe.problem]
    names = [f"{recipe.package}/{recipe.name}" if "/" in incomplete else recipe.name for recipe in usable]
    return _starting(dict.fromkeys(names), incomplete)


def staged_names(incomplete: str) -> list[str]:
    """Return recipes with stages."""
    return _starting([recipe.name for recipe in get_host().recipes() if _is_staged(recipe.file)], incomplete)


def recipe_or_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return recipes, or overrides if --config names one."""
    return overrides(ctx, incomplete) if ctx.params.get("config") else recipe_names(incomplete)


def recipes_and_overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return recipes and overrides, in any order."""
    return recipe_names(incomplete) + (overrides(ctx, incomplete) if incomplete else [])


def reward_or_recipe(incomplete: str) -> list[str]:
    """Return reward plugins and recipes."""
    return list(dict.fromkeys(_starting(get_host().names("rewards"), incomplete) + recipe_names(incomplete)))


def reward_settings(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return settings of the named reward, or overrides of the named recipe."""
    name = str(ctx.params.get("name") or "")
    if name in get_host().names("rewards"):
        return _starting([f"{setting}=" for setting in _settings("rewards", name)], incomplete)
    return overrides(ctx, incomplete)


def axes(incomplete: str) -> list[str]:
    """Return the axes."""
    return _starting(AXES, incomplete)


def names_of_axis(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the plugins of the axis named before."""
    return _starting(get_host().names(str(ctx.params.get("axis"))), incomplete)


def plugin_option(incomplete: str) -> list[str]:
    """Return no:PACKAGE and no:axis.name."""
    entries = get_host().offers()
    words = {entry.package for entry in entries} | {f"{entry.axis}.{entry.name}" for entry in entries if entry.axis}
    return _starting([f"no:{word}" for word in sorted(words)], incomplete)


# Overrides


def overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return overrides of the recipe named before."""
    given = [ctx.params.get(name) for name in ("config", "recipe", "name")] + list(ctx.params.get("words") or ())
    recipe = _read(next((word for word in given if word and "=" not in str(word)), None))
    return _next_level(_overrides(recipe, ctx.params.get("words") or (), incomplete), incomplete)


def stage_overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return overrides of the stages of the recipe named before."""
    found: list[str] = []
    for name, stage in (_read(ctx.params.get("name")).get("stages") or {}).items():
        if incomplete.startswith(f"{name}.") or f"{name}.".startswith(incomplete):
            within = incomplete[len(name) + 1 :]
            recipes = [f"recipe={recipe}" for recipe in recipe_names("") if within.startswith("recipe=")]
            own = _overrides(_read(stage.get("recipe")), (), within)
            found += [f"{name}.{word}" for word in ("recipe=", *recipes, *own)]
    return _next_level(found, incomplete)


def _next_level(words: Iterable[str], incomplete: str) -> list[str]:
    """Return the words that start with `incomplete`, each cut after its next dot; a single one is completed further."""
    matches = _starting(words, incomplete)
    found = list(dict.fromkeys(_up_to_dot(word, len(incomplete)) for word in matches))
    return _next_level(matches, found[0]) if len(found) == 1 and found[0] not in (matches[0], incomplete) else found


def _up_to_dot(word: str, start: int) -> str:
    dot = word.find(".", start, (word + "=").index("="))
    return word if dot < 0 else word[: dot + 1]


def _overrides(recipe: dict[str, Any], words: Iterable[str], incomplete: str) -> Iterator[str]:
    """Yield the `key=` and `key=value` words of a recipe whose first key may start `incomplete`."""
    from hf_rlhf.config.recipe_yaml import KEYS, OFFLINE, OFFLINE_KEYS
    from hf_rlhf.config.sections import SECTIONS

    head = incomplete.partition(".")[0].partition("=")[0]
    for key in _starting(OFFLINE_KEYS if OFFLINE in recipe else [k for k in KEYS if k != OFFLINE], head):
        if key in SECTIONS:
            yield from (f"{key}.{field.name}=" for field in fields(SECTIONS[key]))
            yield from (f"{key}.{name}={value}" for name, values in _choices(SECTIONS[key]) for value in values)
        elif key == "training":
            yield from (f"training.{name}=" for name in training_arguments())
        elif key in LISTS:
            chosen: list[Any] = recipe[key] if isinstance(recipe.get(key), list) else []
            for place, plugin in enumerate([*chosen, None]):
                yield from _plugin(key, f"{key}.{place}", plugin, words)
        elif key in AXES:
            yield from _plugin(key, key, recipe.get(key), words)


def _plugin(axis: str, path: str, chosen: Any, words: Iterable[str]) -> Iterator[str]:
    """Yield the plugins that fit a place of a recipe, and the settings of the chosen one."""
    yield from (f"{path}.use={name}" for name in get_host().names(axis))
    name = chosen.get("use") if isinstance(chosen, dict) else chosen
    for word in words:
        key, _, value = word.partition("=")
        name = value if key in (path, f"{path}.use") else name
    for setting, default in (_settings(axis, name) if isinstance(name, str) else {}).items():
        if inner := next((axis for axis in sorted(NESTED) if axis.rpartition("_")[2] == setting), None):
            yield from (f"{path}.{setting}.use={name}" for name in get_host().names(inner))
        else:
            yield f"{path}.{setting}="
            if default:
                yield f"{path}.{setting}={default}"


def _choices(section: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield the settings of a section that are truth values or one of a few words, with their values."""
    from hf_rlhf.registry.settings_schema import setting_types

    for name, wanted in setting_types(section).items():
        if wanted is bool:
            yield name, ["true", "false"]
        elif get_origin(wanted) is Literal:
            yield name, [str(value) for value in get_args(wanted)]


# Sources


def _read(name: Any) -> dict[str, Any]:
    """Return a recipe as it is written; empty if there is none."""
    from hf_rlhf.config.recipe import read_recipe

    try:
        return read_recipe(str(name)) if name else {}
    except (UserError, OSError):
        return {}


def _is_staged(file: Path) -> bool:
    return re.search(r"^stages:", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None


@functools.cache
def _settings(axis: str, name: str) -> dict[str, str]:
    """Return the settings of a plugin's class with their defaults as a recipe writes them ("" if unknown)."""
    name = name.rpartition("/")[2]
    entry = next((entry for entry in get_host().offers(axis) if entry.name == name and not entry.problem), None)
    classes = _classes(entry.module) if entry else {}
    for node in classes.values():
        if f"name = {name!r}" in {ast.unparse(item).replace(": ClassVar[str]", "") for item in node.body}:
            return dict(_fields(node, classes))
    return {}


@functools.cache
def training_arguments() -> list[str]:
    """Return the fields of TrainingArguments."""
    classes = _classes("transformers.training_args")
    return [name for name, _ in _fields(classes["TrainingArguments"], classes)] if classes else []


def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Return the classes of a module, from its source."""
    try:
        return {node.name: node for node in ast.parse(source_of(module)).body if isinstance(node, ast.ClassDef)}
    except SyntaxError:
        return {}


def _fields(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(classes[base.id], classes)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            made = ast.unparse(item.value) if isinstance(item.value, ast.Call) else ""
            if "ClassVar" in ast.unparse(item.annotation) or "init=False" in made:
                continue
            default = item.value.value if isinstance(item.value, ast.Constant) else None
            text = str(default).lower() if isinstance(default, bool) else str(default or "")
            yield item.target.id, text if re.fullmatch(r"[\w.+-]*", text) else ""


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
