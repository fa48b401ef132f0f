"""What a shell offers on Tab: recipes, axes, plugins, overrides, flags and files, without importing torch or a plugin.

Typer installs it (`hf-rlhf --install-completion`) and asks through the environment variable _HF_RLHF_COMPLETE. Settings of a
plugin are read off its source.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from hf_rlhf.axes import AXES, LISTS, NESTED
from hf_rlhf.registry.discovery import _folders
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.errors import UserError

VARIABLE = "_HF_RLHF_COMPLETE"
RECIPE_FILES = (".yaml", ".yml")


def run(app: typer.Typer) -> None:
    """Runs the command line, or answers a shell."""
    if os.environ.get(VARIABLE) != "complete_bash":
        app(prog_name="hf-rlhf")
        return
    cut = _join_words()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            app(prog_name="hf-rlhf")
    finally:
        for line in said.getvalue().splitlines():
            if len(line) > cut:
                print(line[cut:])


def _join_words() -> int:
    """Puts together again what bash takes apart at `=`; how much of the words that are offered stands on its line already.

    Bash completes `advantages.use=g` as three words, of which it replaces the last alone.
    """
    words, number = os.environ.get("COMP_WORDS", "").split(), int(os.environ.get("COMP_CWORD", "0"))
    words += [""] * (number + 1 - len(words))
    joined: list[str] = []
    place = 0
    for i, word in enumerate(words[: number + 1]):
        if joined and i > 1 and (word == "=" or joined[-1].endswith("=")):
            joined[-1] += word
        else:
            joined.append(word)
            place = len(joined) - 1
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = " ".join(joined), str(place)
    head, equals, _ = joined[-1].rpartition("=")
    return len(head + equals)


class WithFlags(TyperCommand):
    """A command that takes every field of TrainingArguments as a flag."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The command's own options, and the flags."""
        items: list[Any] = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("--"):
            from hf_rlhf.cli.flags import FLAGS

            known = {item.value for item in items}
            words = [f"--{name}" for name in [*FLAGS, "use_peft", *training_arguments()]]
            items += [_item(word) for word in dict.fromkeys(words) if word.startswith(incomplete) and word not in known]
        return items


def _item(word: str) -> Any:
    try:
        made: Any = importlib.import_module("typer._click.shell_completion")
    except ImportError:  # Typer before it had a click of its own
        made = importlib.import_module("click.shell_completion")
    return made.CompletionItem(word)


# Arguments


def recipe_names(incomplete: str) -> list[str]:
    """Recipes, and YAML files."""
    names = [recipe.name for recipe in get_host().recipes() if not recipe.problem]
    packaged = [f"{r.package}/{r.name}" for r in get_host().recipes() if "/" in incomplete and not r.problem]
    return _starting([*dict.fromkeys(names), *packaged], incomplete) + _files(incomplete, RECIPE_FILES)


def staged_names(incomplete: str) -> list[str]:
    """Recipes with stages, and YAML files."""
    staged = [recipe.name for recipe in get_host().recipes() if _is_staged(recipe.file)]
    return _starting(staged, incomplete) + _files(incomplete, RECIPE_FILES)


def recipe_or_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Recipes; overrides where --config names one."""
    return overrides(ctx, incomplete) if ctx.params.get("config") else recipe_names(incomplete)


def recipes_and_overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Recipes and overrides, in any order."""
    found = list(_overrides(_first_recipe(ctx), ctx.params.get("words") or (), incomplete))
    return recipe_names(incomplete) + (found if incomplete else [])


def reward_or_recipe(incomplete: str) -> list[str]:
    """Reward plugins, recipes and Python files."""
    names = _starting(get_host().names("rewards"), incomplete) + recipe_names(incomplete)
    return list(dict.fromkeys(names + _files(incomplete, (".py",))))


def reward_settings(ctx: typer.Context, incomplete: str) -> list[str]:
    """Settings of the named reward, or overrides of the named recipe."""
    name = str(ctx.params.get("name") or "")
    if name in get_host().names("rewards"):
        return _starting([f"{setting}=" for setting in _settings("rewards", name)], incomplete)
    return overrides(ctx, incomplete)


def axes(incomplete: str) -> list[str]:
    """The axes."""
    return _starting(AXES, incomplete)


def names_of_axis(ctx: typer.Context, incomplete: str) -> list[str]:
    """The plugins of the axis that was named before."""
    return _starting(_names(str(ctx.params.get("axis"))), incomplete)


def plugin_option(incomplete: str) -> list[str]:
    """no:PACKAGE, no:axis.name and Python files."""
    offers = get_host().offers()
    words = {offer.package for offer in offers} | {f"{offer.axis}.{offer.name}" for offer in offers if offer.axis}
    return _starting([f"no:{word}" for word in sorted(words)], incomplete) + _files(incomplete, (".py",))


# Overrides


def overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Overrides of the recipe that was named before."""
    return list(_overrides(_first_recipe(ctx), ctx.params.get("words") or (), incomplete))


def stage_overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Overrides of the stages of the recipe that was named before."""
    stages = _read(ctx.params.get("name")).get("stages") or {}
    found = []
    for stage, said in stages.items():
        within = incomplete.removeprefix(f"{stage}.")
        if not incomplete.startswith(f"{stage}."):
            found += _starting([f"{stage}."], incomplete)
        elif within.startswith("recipe="):
            found += [f"{stage}.recipe={name}" for name in recipe_names(within.removeprefix("recipe="))]
        else:
            words = [f"{stage}.{word}" for word in _overrides(_read(said.get("recipe")), (), within)]
            found += _starting([f"{stage}.recipe="], incomplete) + words
    return found


def _overrides(recipe: dict[str, Any], words: Iterable[str], incomplete: str) -> Iterator[str]:
    """`key=value` words that begin as `incomplete` does."""
    from hf_rlhf.config.recipe_yaml import KEYS, OFFLINE, OFFLINE_KEYS
    from hf_rlhf.config.sections import SECTIONS

    key, equals, begun = incomplete.partition("=")
    head, *rest = key.split(".")
    if equals:
        yield from (f"{key}={value}" for value in _starting(_values(key), begun))
    elif not rest:
        keys = OFFLINE_KEYS if OFFLINE in recipe else [k for k in KEYS if k != OFFLINE]
        found = _starting(keys, head)
        if len(found) != 1:
            yield from (f"{name}." if name in SECTIONS or name == "training" else f"{name}.use=" for name in found)
        else:
            yield from _overrides(recipe, words, f"{found[0]}.")
    elif head in SECTIONS or head == "training":
        names = [field.name for field in fields(SECTIONS[head])] if head in SECTIONS else training_arguments()
        yield from _starting([f"{head}.{name}=" for name in names], key)
    elif head in AXES:
        yield from _of_axis(recipe, list(words), head, rest, incomplete)


def _of_axis(recipe: dict[str, Any], words: list[str], axis: str, rest: list[str], incomplete: str) -> Iterator[str]:
    """The places below an axis: its plugins, and the settings of the one that is chosen."""
    chosen: Any = recipe.get(axis)
    path = axis
    if axis in LISTS:
        held = chosen if isinstance(chosen, list) else []
        if len(rest) < 2:
            yield from _starting([f"{axis}.{place}.use=" for place in range(len(held) + 1)], incomplete)
            return
        path, place = f"{axis}.{rest[0]}", int(rest[0]) if rest[0].isdigit() else len(held)
        chosen, rest = held[place] if place < len(held) else None, rest[1:]
    if len(rest) > 1:
        inner = _nested(rest[0])
        if inner:
            yield from _starting([f"{path}.{rest[0]}.use={name}" for name in _names(inner)], incomplete)
        return
    name = chosen.get("use") if isinstance(chosen, dict) else chosen
    for word in words:
        key, _, value = word.partition("=")
        name = value if key in (path, f"{path}.use") else name
    found = [f"{path}.use={other}" for other in _names(axis)]
    for setting, default in (_settings(axis, name) if isinstance(name, str) else {}).items():
        inner = ".use=" if _nested(setting) else "="
        found += [f"{path}.{setting}{inner}"] + ([f"{path}.{setting}={default}"] if default and inner == "=" else [])
    yield from _starting(found, incomplete)


def _values(key: str) -> list[str]:
    """What can stand behind `key=`."""
    from hf_rlhf.config.sections import SECTIONS

    *path, last = key.split(".")
    axis = _nested(path[-1]) or path[0] if path and last == "use" else key
    if axis in AXES:
        return _names(axis)
    if len(path) == 1 and path[0] in SECTIONS:
        from hf_rlhf.registry.settings_schema import setting_types

        wanted = setting_types(SECTIONS[path[0]]).get(last)
        if wanted is bool:
            return ["true", "false"]
        if get_origin(wanted) is Literal:
            return [str(value) for value in get_args(wanted)]
    return []


# Where it is looked up


def _names(axis: str) -> list[str]:
    return get_host().names(axis)


def _nested(setting: str) -> str | None:
    """The axis of the plugin inside a setting of this name."""
    return next((axis for axis in sorted(NESTED) if axis.rpartition("_")[2] == setting), None)


def _first_recipe(ctx: typer.Context) -> dict[str, Any]:
    given = [ctx.params.get(name) for name in ("config", "recipe", "name")] + list(ctx.params.get("words") or ())
    return _read(next((word for word in given if word and "=" not in str(word)), None))


def _read(name: Any) -> dict[str, Any]:
    """A recipe as it is written; empty where there is none."""
    from hf_rlhf.config.recipe import read_recipe

    try:
        return read_recipe(str(name)) if name else {}
    except (UserError, OSError):
        return {}


def _is_staged(file: Path) -> bool:
    return re.search(r"^stages:", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None


@functools.cache
def _settings(axis: str, name: str) -> dict[str, str]:
    """Setting -> its default as a recipe writes it, or nothing, of a plugin's class as its source has it."""
    offer = next((o for o in get_host().offers(axis) if o.name == name.rpartition("/")[2] and not o.problem), None)
    parent, _, module = offer.module.rpartition(".") if offer else ("", "", "")
    for folder in _folders(parent) if parent else ():
        with contextlib.suppress(OSError, SyntaxError):
            tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
            classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
            for node in classes.values():
                if any(_assigns(item, "name", name.rpartition("/")[2]) for item in node.body):
                    return dict(_fields(node, classes))
    return {}


def _assigns(item: ast.stmt, variable: str, value: str) -> bool:
    named = isinstance(item, ast.Assign) and any(isinstance(t, ast.Name) and t.id == variable for t in item.targets)
    return named and isinstance(item.value, ast.Constant) and item.value.value == value  # type: ignore[attr-defined]


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


@functools.cache
def training_arguments() -> list[str]:
    """The fields of TrainingArguments, read off its source."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    text = (Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8")
    body = re.split(r"^class TrainingArguments\b.*:$", text, maxsplit=1, flags=re.MULTILINE)[-1]
    return re.findall(
        r"^    ([a-z]\w*): ", re.split(r"^    def ", body, maxsplit=1, flags=re.MULTILINE)[0], re.MULTILINE
    )


def _files(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files of these kinds, and folders, that begin so."""
    folder, begun = os.path.split(incomplete)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    found = []
    for entry in entries:
        if entry.name.startswith(begun) and (begun or not entry.name.startswith(".")):
            if entry.is_dir() and (begun or folder):
                found.append(os.path.join(folder, entry.name) + "/")
            elif entry.name.endswith(suffixes):
                found.append(os.path.join(folder, entry.name))
    return found


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
