"""Turn the plain data of a recipe into plugins and sections, and collect everything that is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_rlhf.axes import AXES, LISTS, Plugin, RewardSource
from hf_rlhf.config.mappings import mapped, meaning
from hf_rlhf.config.recipe_yaml import DEFAULTS, unnamed
from hf_rlhf.registry.host import Host
from hf_rlhf.registry.settings_schema import (
    MISSING,
    Nested,
    at_path,
    checked,
    nested,
    plain,
    plain_text,
    setting_types,
    settings_of,
    type_text,
)
from hf_rlhf.runtime.errors import UserError, did_you_mean


class RecipeReader:
    """Make plugins and sections from plain data and collect the problems.

    Each method returns what it made, or None, and the plain data from which it can be made again.
    """

    def __init__(self, host: Host):
        self.host = host
        self.problems: list[tuple[str, str]] = []
        self.given: list[Plugin] = []

    def refuse(self, path: str, text: str) -> tuple[None, None]:
        """Add a problem."""
        self.problems.append((path, text))
        return None, None

    def axis(self, axis: str, given: Any, meant: Any = None) -> tuple[Any, Any]:
        """Make the plugin or plugins of a top-level axis; `meant` is the one for an axis that is left out."""
        names = ", ".join(self.host.names(axis))
        if given is MISSING:
            return self.refuse(axis, f"is missing; write `{axis}: {{use: NAME}}`. There are: {names}")
        if axis in LISTS:
            return self.plugins(axis, given, axis)
        before = len(self.problems)
        made, text = self.plugin(axis, given, axis, DEFAULTS.get(axis))
        if meant and isinstance(given, Mapping) and "use" not in given and len(self.problems) > before:
            path, problem = self.problems[-1]
            self.problems[-1] = path, problem + unnamed(axis, meant, given, self.host)
        return made, text

    def plugins(self, axis: str, given: Any, path: str) -> tuple[Any, Any]:
        """Read a list of plugins, or one in place of a list of one."""
        if isinstance(given, str | Mapping | Plugin):
            given = [given]
        if not isinstance(given, list):
            return self.refuse(
                path, f"takes a list, `[]` for none and `{{use: NAME}}` for one; got {plain_text(given)}"
            )
        made = [self.plugin(axis, item, f"{path}.{place}") for place, item in enumerate(given)]
        return [plugin for plugin, _ in made], [text for _, text in made]

    def plugin(self, axis: str, given: Any, path: str, default: str | None = None) -> tuple[Any, Any]:
        """One plugin, from `{use: name, ...}`, a name, or an instance."""
        if isinstance(given, Plugin):
            if isinstance(given, AXES[axis]):
                self.given.append(given)
                return given, _as_plain(given)
            return self.refuse(path, f"takes a plugin of the axis {axis}; got {given!r}")
        if isinstance(given, str):
            given = {"use": given}
        use = given.get("use", default) if isinstance(given, Mapping) else None
        if not isinstance(use, str):
            names = ", ".join(self.host.names(axis))
            return self.refuse(
                path, f"takes `{{use: NAME, ...}}` or just a name; got {plain_text(given)}. There are: {names}"
            )
        try:
            cls = self.host.get(axis, use)
        except UserError as error:
            return self.refuse(path, str(error))
        made, text = self.group(cls, {key: value for key, value in given.items() if key != "use"}, path)
        if isinstance(made, RewardSource) and "." in path:  # `load_plugin` makes one without a place
            made.recipe_path = path
        return made, {"use": use, **(text or {})}

    def group(self, cls: type, given: Any, path: str) -> tuple[Any, Any]:
        """Make a dataclass: a section, a group of settings inside one, or a plugin with its settings."""
        if not isinstance(given, Mapping):
            names = ", ".join(setting_types(cls))
            return self.refuse(path, f"takes a mapping with the settings {names}; got {plain_text(given)}")
        before = len(self.problems)
        hints = setting_types(cls)
        owner = f"{path}={cls.name}" if issubclass(cls, Plugin) else path
        for key in given:
            if key not in hints:
                has = f"It has: {', '.join(hints)}" if hints else "It has none"
                hint = did_you_mean(key, hints) or mapped(key)
                self.refuse(f"{path}.{key}", f"{owner} has no such setting.{hint} {has}")
        values: dict[str, Any] = {}
        texts: dict[str, Any] = {}
        for setting in settings_of(cls):
            value = given.get(setting.name, MISSING)
            held = nested(hints[setting.name])
            place = f"{path}.{setting.name}"
            if held and (value is not MISSING or "use" in setting.metadata):
                values[setting.name], texts[setting.name] = self.nested(held, setting, value, place)
            elif value is not MISSING:
                try:
                    values[setting.name] = checked(cls, setting.name, value)
                except ValueError as error:
                    self.refuse(place, str(error))
            elif setting.default is MISSING and setting.default_factory is MISSING:
                self.refuse(place, f"{owner} needs it; it takes {type_text(hints[setting.name])}")
        if len(self.problems) > before:
            return None, None
        try:
            made = cls(**values)
        except (ValueError, TypeError) as error:
            return self.refuse(path, at_path(path, cls, str(error)))
        return made, {**settings_as_plain(made), **texts}

    def nested(self, held: Nested, setting: dataclasses.Field[Any], value: Any, path: str) -> tuple[Any, Any]:
        """Make a setting that is a plugin, a list of plugins or a group of settings."""
        if value is None and held.optional:
            return None, None
        if held.group:
            return (value, _as_plain(value)) if isinstance(value, held.group) else self.group(held.group, value, path)
        assert held.axis
        if held.many:
            return self.plugins(held.axis, value, path)
        default = setting.metadata.get("use")
        return self.plugin(held.axis, {} if value is MISSING else value, path, default)

    def reference(self, plugins: Mapping[str, Any], lora: bool) -> str:
        """Return the default reference: the policy before training if anything is measured against it."""
        made = [x for value in plugins.values() for x in (value if isinstance(value, list) else [value])]
        read = (x for x in made if x is not None and getattr(x, "reference", None) is None)  # no KL with its own
        if not any("ref_logps" in plugin.needs for plugin in read):
            return "none"
        return "adapter_off" if lora else "frozen"

    def training(self, given: Any) -> dict[str, Any]:
        """Check names and types of keywords of TrainingArguments; values stay as written."""
        if not isinstance(given, Mapping):
            self.refuse("training", f"takes keywords of transformers.TrainingArguments; got {plain_text(given)}")
            return {}
        if not given:
            return {}
        from hf_rlhf.config.training_arguments import argument_names

        names = argument_names()
        for key in given:
            if key not in names:
                text = f"transformers.TrainingArguments has no such setting.{meaning(key, names)}"
                self.refuse(f"training.{key}", text)
        if self.host.only_names:
            return dict(given)
        from transformers import TrainingArguments

        kept: dict[str, Any] = {}
        for key, value in given.items():
            if key not in names:
                continue
            if key == "fsdp" and isinstance(value, bool):  # annotated as text, for transformers' own parser alone
                kept[key] = value
                continue
            try:
                number = checked(TrainingArguments, key, value)
            except ValueError as error:
                self.refuse(f"training.{key}", str(error))
            else:
                # Text that is a number reaches TrainingArguments as one: it would compare or add it.
                kept[key] = number if isinstance(number, int | float) else value
        return kept


def settings_as_plain(made: Any) -> dict[str, Any]:
    """Return the settings of a plugin or a section as a recipe would write them, nested plugins included."""
    held = {name: nested(hint) for name, hint in setting_types(type(made)).items()}
    return {
        name: _as_plain(getattr(made, name)) if holds else plain(type(made), name, getattr(made, name))
        for name, holds in held.items()
    }


def _as_plain(made: Any) -> Any:
    """Return a plugin, a group of settings, a list of them or None as a recipe would write it."""
    if made is None:
        return None
    if isinstance(made, list):
        return [_as_plain(item) for item in made]
    name = {"use": made.name} if isinstance(made, Plugin) else {}
    return {**name, **settings_as_plain(made)}
