"""Check the names in a recipe without importing torch or a plugin.

A recipe is resolved against stand-ins: classes with the settings that a plugin's source declares, taking any value. So
misspelt recipes, plugins and settings are reported in a fraction of the time that importing the plugins takes.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable
from functools import cache
from types import GenericAlias
from typing import Any, Literal

from hf_rlhf import axes
from hf_rlhf.axes import AXES, Plugin
from hf_rlhf.config.hub_names import check_hub_names
from hf_rlhf.config.plugin_tree import walk
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.registry.discovery import source_of
from hf_rlhf.registry.host import Host, get_host, use_host
from hf_rlhf.registry.settings_schema import setting_types, settings_of

Settings = dict[str, tuple[Any, dict[str, str]]]
"""Setting -> its type, `Any` where the source alone does not tell, and its metadata."""
BASES = {cls.__name__: cls for cls in AXES.values()}
NAMES = {name: getattr(axes, name) for name in ("HubModel", "HubTokenizer", "HubDataset")}
NESTED = re.compile(rf"(list\[)?({'|'.join(BASES)})\]?( \| None)?")


def check_names(name_or_path: str, overrides: Iterable[str] = (), loads: bool = False) -> None:
    """Raise what `load_recipe` would raise for misspelt names; values of plugins' settings are not checked.

    With `loads`, names of models and datasets must be there too.
    """
    with use_host(Outline(get_host())):
        recipe = load_recipe(name_or_path, overrides)
    if loads:
        check_hub_names([*recipe.sections.items(), *walk(recipe.plugins)])


class Outline(Host):
    """A host with the entries of another one whose classes are stand-ins."""

    only_names = True

    def __init__(self, host: Host):
        self.__dict__.update(vars(host))
        self.host = host

    def get(self, axis: str, name: str) -> type[Plugin]:
        """Return a stand-in for a plugin class; the class itself for plugins of files and where the source is unclear."""
        entry = self.find(axis, name)
        found = None if entry.file else _settings(entry.module, entry.name)
        return self.host.get(axis, name) if found is None else found


@cache
def _settings(module: str, name: str) -> type[Plugin] | None:
    """Return a dataclass with the settings of the plugin `name` of a module."""
    for cls in _classes(module).values():
        named = [item for item in cls.body if isinstance(item, ast.Assign | ast.AnnAssign) and _is_name(item, name)]
        settings = _inherited(module, cls.name) if named else None
        if settings is not None:
            fields = [
                (setting, hint, dataclasses.field(default=None, metadata=metadata))
                for setting, (hint, metadata) in settings.items()
            ]
            return dataclasses.make_dataclass(cls.name, fields, bases=(Plugin,), namespace={"name": name}, kw_only=True)
    return None


def _is_name(item: ast.Assign | ast.AnnAssign, name: str) -> bool:
    targets = item.targets if isinstance(item, ast.Assign) else [item.target]
    return any(isinstance(t, ast.Name) and t.id == "name" for t in targets) and (
        isinstance(item.value, ast.Constant) and item.value.value == name
    )


@cache
def _tree(module: str) -> ast.Module:
    try:
        return ast.parse(source_of(module))
    except SyntaxError:
        return ast.Module([], [])


def _classes(module: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _tree(module).body if isinstance(node, ast.ClassDef)}


def _inherited(module: str, name: str) -> Settings | None:
    """Return the settings of a class and its bases, in the order of a dataclass; None where a base is not found."""
    if name == "ABC":
        return {}
    if module == axes.__name__:
        base = getattr(axes, name, None)
        if isinstance(base, type) and issubclass(base, Plugin):
            return {
                setting.name: (setting_types(base)[setting.name], dict(setting.metadata))
                for setting in settings_of(base)
            }
        return None
    cls = _classes(module).get(name)
    if cls is None:
        origin = _imported_from(module, name)
        return None if origin is None else _inherited(origin, name)
    found: Settings = {}
    for base_node in reversed(cls.bases):
        inherited = _inherited(module, base_node.id) if isinstance(base_node, ast.Name) else None
        if inherited is None:
            return None
        found |= inherited
    return found | _own(cls)


def _imported_from(module: str, name: str) -> str | None:
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            parents = module.split(".")[: -node.level] if node.level else []
            return ".".join([*parents, *([node.module] if node.module else [])])
    return None


def _own(cls: ast.ClassDef) -> Settings:
    found: Settings = {}
    for item in cls.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        text = ast.unparse(item.annotation)
        call = item.value if isinstance(item.value, ast.Call) else None
        if "ClassVar" in text or (
            call and any(k.arg == "init" and ast.unparse(k.value) == "False" for k in call.keywords)
        ):
            continue
        uses = (
            call and ast.unparse(call.func).endswith("choice") and call.args and isinstance(call.args[0], ast.Constant)
        )
        found[item.target.id] = (_hint(text), {"use": call.args[0].value} if call and uses else {})  # type: ignore[attr-defined]
    return found


def _hint(annotation: str) -> Any:
    """Return the type of a setting that holds plugins or names files or repositories; `Any` for every other annotation."""
    hint: Any
    parts = annotation.split(" | ")
    if (name := next((part for part in parts if part in NAMES), None)) is not None:
        words = [ast.literal_eval(f"({part[8:-1]},)") for part in parts if part.startswith("Literal[")]
        hint = Literal[*words[0]] | NAMES[name] if words else NAMES[name]
        return hint | None if "None" in parts else hint
    match = NESTED.fullmatch(annotation)
    if match is None:
        return Any
    many, name, optional = match.groups()
    hint = GenericAlias(list, (BASES[name],)) if many else BASES[name]
    return hint | None if optional else hint
