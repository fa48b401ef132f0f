"""Overrides of a recipe: `kl.0.beta=0.1`, `advantages.use=leave_one_out`, `kl=[]`, `rewards.1={use: length}`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_rlhf.axes import LISTS
from hf_rlhf.config.mappings import mapped
from hf_rlhf.config.offline_sections import OFFLINE_SECTIONS
from hf_rlhf.config.recipe_yaml import DEFAULTS, KEYS, OFFLINE, TOP_AXES, RecipeError, read_yaml, unknown_key
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.registry.host import Host, get_host
from hf_rlhf.registry.settings_schema import (
    accepts,
    inner_type,
    nested,
    plain_text,
    setting_types,
    settings_of,
    takes_text,
    type_text,
)
from hf_rlhf.runtime.errors import UserError

QUOTED = re.compile(r"""\s*(".*"|'.*'|[|>].*\n.*)\s*""", re.DOTALL)
"""Text in YAML's quotes, or a block of it."""
NULLS = ("", "~", "null", "Null", "NULL")


def apply_overrides(
    raw: Mapping[str, Any], overrides: Iterable[str | tuple[str, Any]], host: Host | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe with overrides applied in order, and notes of dropped settings.

    An override is `key.sub=value`, whose value is YAML, or text as written where the setting takes text or it is no YAML; or
    (key, value).
    Writing to the index after a list's last item appends to it. Choosing another plugin (`advantages.use=x` or
    `advantages=x`) drops the settings that it does not share with the old one; `advantages={use: x}` drops them all. Raises
    `RecipeError` with every override whose key does not exist.
    """
    recipe = copy.deepcopy(dict(raw))
    writer = _Writer(recipe, host or get_host())
    problems = []
    for override in overrides:
        path, equals, value = override.partition("=") if isinstance(override, str) else (override[0], "=", override[1])
        try:
            if not equals or not path:
                raise UserError("write KEY=VALUE, for instance kl.0.beta=0.1")
            writer.write(path.split("."), value, is_yaml=isinstance(override, str))
        except UserError as error:
            problems.append((path, str(error)))
    if problems:
        raise RecipeError("the command line", problems)
    return recipe, writer.notes


class _Writer:
    """Write values into a recipe."""

    def __init__(self, recipe: dict[str, Any], host: Host):
        self.recipe = recipe
        self.host = host
        self.notes: list[str] = []
        self.written: set[str] = set()

    def write(self, keys: list[str], value: Any, is_yaml: bool) -> None:
        """Write `value` at the dotted path `keys`, making groups on the way."""
        if keys[0] not in KEYS:
            raise UserError(f"a recipe has no key {keys[0]!r}.{unknown_key('.'.join(keys))} It has: {', '.join(KEYS)}")
        self._refuse_foreign(keys)
        if len(keys) > 1 and keys[0] in LISTS:
            given, indexed = self.recipe.get(keys[0]), keys[1].isdecimal()
            if indexed and isinstance(given, Mapping | str):
                self.recipe[keys[0]] = [given]
            elif not indexed and not given:
                self.recipe[keys[0]] = {}
        node: Any = self.recipe
        for depth, key in enumerate(keys[:-1], start=1):
            node = self._enter(node, key, keys[:depth])
        place: Any = _index(node, keys[-1], keys[:-1]) if isinstance(node, list) else keys[-1]
        old = node.get(place) if isinstance(node, dict) else (node[place] if place < len(node) else None)
        if is_yaml:
            value = _read_value(value, self._type(keys))
        if place == "use" and isinstance(value, str):
            self._switch(node, value, keys[:-1])
        elif isinstance(value, str) and isinstance(old, dict) and self._slot(keys):
            self._switch(old, value, keys)
        elif isinstance(node, list) and place == len(node):
            node.append(value)
        else:
            node[place] = value
        self.written.add(".".join(keys))

    def _refuse_foreign(self, keys: list[str]) -> None:
        """Raise `UserError` for a setting of another library whose group has the name of one here: `critic.optim.lr`."""
        key, name = keys[0], ".".join(keys)
        theirs = mapped(name, whole=True) if len(keys) > 1 and keys[1] != "use" and key not in LISTS else ""
        if not theirs or f"{name}=" in theirs:  # the latter: it is a key here as well
            return
        axis = key in TOP_AXES
        cls = self._class(key, self.recipe.get(key), DEFAULTS.get(key)) if axis else SECTIONS.get(key)
        if cls is None or keys[1] not in setting_types(cls):
            raise UserError(f"{key} has no such setting.{theirs}")

    def _enter(self, node: Any, key: str, path: list[str]) -> Any:
        """Return the group or list at `key`; make a group where there is none, or only a plugin's name."""
        place = _index(node, key, path[:-1]) if isinstance(node, list) else key
        if isinstance(node, list) and place == len(node):
            node.append({})
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = [] if path[0] in LISTS and len(path) == 1 else {}
        if isinstance(node[place], str) and self._slot(path):
            node[place] = {"use": node[place]}
        if not isinstance(node[place], dict | list):
            raise UserError(f"{'.'.join(path)} is {plain_text(node[place])}, which has no settings")
        return node[place]

    def _slot(self, path: list[str]) -> tuple[str, str | None] | None:
        """Return the axis of the plugin at a path and its default plugin; None where the path is not a plugin's."""
        axis, rest, node = path[0], path[1:], self.recipe.get(path[0])
        if axis not in TOP_AXES:
            return None
        default = None if axis in LISTS else DEFAULTS.get(axis)
        many = axis in LISTS and not isinstance(node, Mapping | str)
        while True:
            if many:
                if not rest:
                    return None
                node = node[int(rest[0])] if isinstance(node, list) and int(rest[0]) < len(node) else None
                rest = rest[1:]
            if not rest:
                return axis, default
            cls = self._class(axis, node, default)
            held = nested(setting_types(cls)[rest[0]]) if cls and rest[0] in setting_types(cls) else None
            if cls is None or held is None or held.axis is None:
                return None
            setting = next(setting for setting in settings_of(cls) if setting.name == rest[0])
            axis, many, default = held.axis, held.many, setting.metadata.get("use")
            node = node.get(rest[0]) if isinstance(node, dict) else None
            rest = rest[1:]

    def _type(self, keys: list[str]) -> Any:
        """Return the type of the setting at a path; None where it is unknown, or the place of a plugin without a class."""
        hint: Any = None
        for depth, key in enumerate(keys, start=1):
            slot = self._slot(keys[:depth])
            if slot:
                hint = self._class(slot[0], value_at(self.recipe, keys[:depth]), slot[1])
            elif depth == 1 and key == "training":
                hint = self._arguments()
            elif depth == 1:
                hint = (OFFLINE_SECTIONS if OFFLINE in self.recipe else SECTIONS).get(key)
            else:
                hint = str if key == "use" else inner_type(hint, key)
        return hint

    def _arguments(self) -> Any:
        if self.host.only_names:
            return dict[str, Any]
        from transformers import TrainingArguments

        return TrainingArguments

    def _class(self, axis: str, node: Any, default: str | None) -> type | None:
        use = node.get("use", default) if isinstance(node, dict) else node or default
        try:
            return self.host.get(axis, use) if isinstance(use, str) else None
        except UserError:
            return None  # `resolve` reports it with everything else

    def _switch(self, group: dict[str, Any], name: str, path: list[str]) -> None:
        """Choose another plugin in `group`, and drop the settings that only the old one has."""
        axis, default = self._slot(path) or (None, None)
        old = self._class(axis, group, default) if axis else None
        new = self._class(axis, name, None) if axis else None
        dotted = ".".join(path)
        if old and new:
            gone = [
                key
                for key in group
                if key in setting_types(old) and key not in setting_types(new) and f"{dotted}.{key}" not in self.written
            ]
            self.notes += [f"{dotted}.{key}={plain_text(group.pop(key))} dropped: {name} has no {key}" for key in gone]
        # `use` stands first, as in a recipe written by hand.
        rest = {key: value for key, value in group.items() if key != "use"}
        group.clear()
        group.update({"use": name, **rest})


def value_at(data: Any, path: list[str]) -> Any:
    """Return what plain data has at a path of keys and indices; None where there is nothing."""
    for key in path:
        if isinstance(data, list):
            data = dict(enumerate(data)).get(int(key)) if key.isdecimal() else None
        else:
            data = data.get(key) if isinstance(data, dict) else None
    return data


def _index(items: list[Any], key: str, path: list[str]) -> int:
    """Return the index that `key` means in a list."""
    if not key.isdecimal() or int(key) > len(items):
        dotted = ".".join(path)
        choices = "".join(f"{dotted}.{place}, " for place in range(len(items)))
        raise UserError(f"{dotted} is a list: write {choices}or {dotted}.{len(items)} to append")
    return int(key)


def _read_value(text: str, hint: Any) -> Any:
    """Parse an override's value, of a setting of type `hint` if that is known."""
    is_text = takes_text(hint)
    try:
        value = read_yaml(text, "the value")
    except UserError as error:
        if is_text or hint is Any or not text.lstrip().startswith(("[", "{")):
            return text  # if the setting takes none, the refusal says what it takes
        takes = f"got {text!r}; takes {type_text(hint)}; " if hint is not None else ""
        raise UserError(takes + str(error).partition("\nIf it is text")[0]) from error
    if isinstance(value, str):
        return value if not is_text or QUOTED.fullmatch(text) else text
    if value is None:
        return None if text in NULLS or not (is_text or text.lstrip().startswith("#")) else text
    return text if is_text and isinstance(value, dict | list) and not accepts(hint, value) else value
