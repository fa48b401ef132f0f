"""Overrides of a recipe: `kl.0.beta=0.1`, `advantages.use=leave_one_out`, `kl=[]`, `rewards.1={use: length}`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from hf_rlhf.axes import LISTS
from hf_rlhf.config.mappings import mapped
from hf_rlhf.config.recipe_yaml import DEFAULTS, KEYS, TOP_AXES, RecipeError, read_yaml, unknown_key
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.registry.host import Host, get_host
from hf_rlhf.registry.settings_schema import nested, plain_text, setting_types, settings_of
from hf_rlhf.runtime.errors import UserError


def apply_overrides(
    raw: Mapping[str, Any], overrides: Iterable[str], host: Host | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe with `key.sub=value` overrides applied in order, and notes of dropped settings. Values are YAML.

    Writing to the index after a list's last item appends to it. Choosing another plugin (`advantages.use=x` or
    `advantages=x`) drops the settings that it does not share with the old one; `advantages={use: x}` drops them all. Raises
    `RecipeError` with every override whose key does not exist.
    """
    recipe = copy.deepcopy(dict(raw))
    writer = _Writer(recipe, host or get_host())
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        try:
            if not equals or not path:
                raise UserError("write KEY=VALUE, for instance kl.0.beta=0.1")
            comment = text.lstrip().startswith("#")  # in YAML; here it is a value, such as GSM8K's marker ####
            writer.write(path.split("."), text if comment else read_yaml(text, f"the value {text!r}"))
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

    def write(self, keys: list[str], value: Any) -> None:
        """Write `value` at the dotted path `keys`, making groups on the way."""
        if keys[0] not in KEYS:
            raise UserError(f"a recipe has no key {keys[0]!r}.{unknown_key('.'.join(keys))} It has: {', '.join(KEYS)}")
        self._refuse_foreign(keys)
        node: Any = self.recipe
        for depth, key in enumerate(keys[:-1], start=1):
            node = self._enter(node, key, keys[:depth])
        place: Any = _index(node, keys[-1], keys[:-1]) if isinstance(node, list) else keys[-1]
        old = node.get(place) if isinstance(node, dict) else (node[place] if place < len(node) else None)
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
        many = axis in LISTS
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


def _index(items: list[Any], key: str, path: list[str]) -> int:
    """Return the index that `key` means in a list."""
    if not key.isdecimal() or int(key) > len(items):
        dotted = ".".join(path)
        choices = "".join(f"{dotted}.{place}, " for place in range(len(items)))
        raise UserError(f"{dotted} is a list: write {choices}or {dotted}.{len(items)} to append")
    return int(key)
