"""Find plugins and recipes by name, and load plugins when a recipe names them.

Listing reads the metadata of installed packages and imports nothing. A module is imported, registered with pluggy and called
through its hook when one of its plugins is named, so a package that nobody names is never run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import yaml
from packaging.utils import canonicalize_name

from hf_rlhf.axes import AXES, Plugin, axis_of
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.api_version import refusal, stated
from hf_rlhf.registry.discovery import (
    GROUP,
    RECIPES,
    PluginEntry,
    PluginError,
    RecipeEntry,
    distributions,
    format_error,
    is_from,
    plugin_entry,
    recipe_entries,
    resolve,
    source_of,
)
from hf_rlhf.registry.settings_schema import nested, setting_docs, setting_types, settings_of
from hf_rlhf.runtime.errors import UserError, did_you_mean

OWN_PACKAGE = "hf_rlhf"
DISABLE = "HF_RLHF_DISABLE_PLUGINS"


class Host:
    """Plugins and recipes of installed packages and of files.

    `disable` is a comma-separated list of packages and of `axis.name` to ignore, or `1` for every package but hf_rlhf; by
    default the environment variable HF_RLHF_DISABLE_PLUGINS.
    """

    only_names = False
    """True if its classes are stand-ins, whose settings take any value (`hf_rlhf.config.outline`)."""

    def __init__(self, *, disable: str | None = None) -> None:
        self._manager = pluggy.PluginManager("hf_rlhf")
        self._manager.add_hookspecs(hookspecs)
        self._offers: list[PluginEntry] = []
        self._recipes: list[RecipeEntry] = []
        self._classes: dict[tuple[str, str, str], type[Plugin]] = {}
        for package, version, points, problem in distributions():
            own = [plugin_entry(point, package, version) for point in points if point.group == GROUP]
            self._offers += [replace(offer, problem=offer.problem or problem) for offer in own]
            if problem and not own:
                nothing = PluginEntry(axis="", name="", module="", package=package, version=version, problem=problem)
                self._offers.append(nothing)
            for point in points:
                self._recipes += recipe_entries(point.value, package, version) if point.group == RECIPES else ()
        variable = os.environ.get(DISABLE, "") if disable is None else disable
        for target in filter(None, (part.strip() for part in variable.split(","))):
            self._turn_off(target, f"{DISABLE}={variable}")

    def configure(self, options: Iterable[str]) -> None:
        """Apply `-p` options: `./file.py` adds its plugins, `no:PACKAGE` and `no:axis.name` disable plugins."""
        for option in options:
            if option.startswith("no:"):
                self.turn_off(option.removeprefix("no:"))
            elif option.endswith(".py"):
                self.add_file(option)
            else:
                raise UserError(
                    f"invalid -p {option}: write `-p FILE.py` to add plugins, `-p no:PACKAGE` or `-p no:axis.name` to disable"
                )

    def offers(self, axis: str | None = None) -> list[PluginEntry]:
        """Return every plugin of an axis, or of all axes in the order of a step; one with a `problem` cannot be used."""
        order = {name: place for place, name in enumerate(AXES)}
        chosen = [offer for offer in self._offers if axis is None or offer.axis == axis]
        return sorted(chosen, key=lambda o: (order.get(o.axis, len(order)), o.axis, o.name, o.package))

    def names(self, axis: str) -> list[str]:
        """Return the names that can be used on an axis."""
        return sorted({offer.name for offer in self._offers if offer.axis == axis and not offer.problem})

    def recipes(self) -> list[RecipeEntry]:
        """Return the recipes of every package."""
        return sorted(self._recipes, key=lambda recipe: (recipe.name, recipe.package))

    def turn_off(self, target: str) -> None:
        """Disable a package, its recipes included, or one `axis.name`. Raise `UserError` if there is none."""
        if not self._turn_off(target, f"-p no:{target}"):
            packages = sorted({offer.package for offer in self._offers} | {recipe.package for recipe in self._recipes})
            points = [f"{offer.axis}.{offer.name}" for offer in self._offers]
            raise UserError(
                f"-p no:{target}: there is no such package or plugin.{did_you_mean(target, packages + points)} "
                f"Packages: {', '.join(packages)}; a plugin is written axis.name"
            )

    def _turn_off(self, target: str, said: str) -> bool:
        def hit(entry: PluginEntry | RecipeEntry) -> bool:
            if isinstance(entry, PluginEntry) and (entry.file or target == f"{entry.axis}.{entry.name}"):
                return not entry.file
            if target == "1":
                return canonicalize_name(entry.package) != canonicalize_name(OWN_PACKAGE)
            return canonicalize_name(entry.package) == canonicalize_name(target)

        problem = f"turned off by {said}"
        found = any(map(hit, self._offers)) or any(map(hit, self._recipes))
        self._offers = [replace(entry, problem=problem) if hit(entry) else entry for entry in self._offers]
        self._recipes = [replace(entry, problem=problem) if hit(entry) else entry for entry in self._recipes]
        return found

    def find(self, axis: str, name: str) -> PluginEntry:
        """Return the entry of `name` (or `package/name`) without importing it. Raise `PluginError` naming the choices."""
        check_axis(axis)
        own = [offer for offer in self._offers if offer.axis == axis]
        return resolve(own, name, f"{axis} plugin", self.names(axis), lambda bare: self._elsewhere(axis, bare))

    def find_recipe(self, name: str) -> RecipeEntry:
        """Return the recipe `name` (or `package/name`). Raise `PluginError` naming the choices."""
        names = sorted({recipe.name for recipe in self._recipes if not recipe.problem})
        return resolve(self._recipes, name, "recipe", names, lambda bare: self._on_axes(bare))

    def axes_of(self, name: str) -> list[str]:
        """Return the axes with a plugin `name` (or `package/name`)."""
        package, _, bare = name.rpartition("/")
        fits = [o for o in self._offers if o.name == bare and not o.problem and (not package or is_from(o, package))]
        return [axis for axis in AXES if any(offer.axis == axis for offer in fits)]

    def _on_axes(self, name: str) -> str:
        axes = self.axes_of(name)
        return f" {name!r} is a plugin: {' or '.join(f'{axis}.use={name}' for axis in axes)}." if axes else ""

    def _elsewhere(self, axis: str, name: str) -> str:
        """Say which plugin a recipe of this name uses on the axis, or which other axes have a plugin of this name."""
        recipe = next((recipe for recipe in self._recipes if recipe.name == name and not recipe.problem), None)
        if recipe is None:
            return self._on_axes(name)
        raw = yaml.safe_load(recipe.file.read_text(encoding="utf-8"))
        base = AXES[axis].axis
        if not base.nested and axis not in raw and (base.default is None or not raw.keys() & AXES.keys() - {"trainer"}):
            return f" {name!r} is a recipe, which leaves {axis} out."
        return f" {name!r} is a recipe, and uses {' and '.join(self._used_by(raw, axis)) or 'nothing'} on this axis."

    def _used_by(self, raw: dict[str, Any], wanted: str) -> Iterator[str]:
        """Yield the plugins of a recipe on an axis, nested and default ones included."""

        def visit(axis: str, given: Any, default: str | None) -> Iterator[str]:
            for item in given if isinstance(given, list) else [given]:
                settings = item if isinstance(item, dict) else {"use": item}
                use = settings.get("use") or default
                if axis == wanted and use:
                    yield use
                elif use and AXES[wanted].axis.nested:
                    cls = self.get(axis, use)
                    for setting in settings_of(cls):
                        held = nested(setting_types(cls)[setting.name])
                        if held and held.axis:
                            yield from visit(held.axis, settings.get(setting.name), setting.metadata.get("use"))

        for axis, base in AXES.items():
            default = base.axis.default if isinstance(base.axis.default, str) else None
            if axis == wanted or (AXES[wanted].axis.nested and not base.axis.nested):
                yield from visit(axis, raw.get(axis, None if default else []), default)

    def get(self, axis: str, name: str) -> type[Plugin]:
        """Import and return the plugin class `name` (or `package/name`). Raise `PluginError` if that fails."""
        offer = self.find(axis, name)
        key = (offer.module, axis, offer.name)
        if key not in self._classes:
            self._load(offer)
        return self._classes[key]

    def manifest(self, classes: Iterable[type[Plugin]]) -> list[dict[str, Any]]:
        """Return axis, name, package, version, module and SHA-256 of the module's file of each class, for a run's record."""
        rows = []
        for cls in classes:
            axis = axis_of(cls)
            key = (cls.__module__, axis, cls.name)
            offer = next((o for o in self._offers if (o.module, o.axis, o.name) == key), None)
            file = getattr(sys.modules.get(cls.__module__), "__file__", None)
            rows.append(
                {
                    "axis": axis,
                    "name": cls.name,
                    "package": offer.package if offer else None,
                    "version": offer.version if offer else None,
                    "module": cls.__module__,
                    "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None,
                }
            )
        return rows

    def add_file(self, path: str | Path) -> list[PluginEntry]:
        """Import a Python file and add the plugins that its hooks return. Adding a file twice changes nothing."""
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            raise UserError(f"-p {path}: no such file")
        source = file.read_bytes()
        module = ModuleType(f"hf_rlhf_file_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}")
        known = [offer for offer in self._offers if offer.module == module.__name__]
        if known:
            return known
        module.__file__ = str(file)
        template = PluginEntry(
            axis="",
            name="",
            module=module.__name__,
            package=str(path),
            version=hashlib.sha256(source).hexdigest()[:12],
            file=file,
        )
        if problem := refusal(stated(source.decode("utf-8", "replace")), template.source, None):
            raise PluginError(problem)
        sys.modules[module.__name__] = module
        try:
            # Compiled here, not by an import: what runs is what was hashed, never a stale .pyc.
            exec(compile(source, str(file), "exec"), module.__dict__)  # noqa: S102  (a file that the user passes with -p)
            axes = self._register(module, template)
            if not axes:
                raise PluginError(f"{template.source} offers nothing: it has no function marked with @hookimpl")
            answers = {axis: self._ask(module, replace(template, axis=axis)) for axis in axes}
        except (Exception, SystemExit) as error:
            del sys.modules[module.__name__]
            if self._manager.has_plugin(module.__name__):
                self._manager.unregister(name=module.__name__)
            if isinstance(error, PluginError):
                raise
            raise PluginError(f"{template.source} cannot be imported: {format_error(error)}") from error
        added = []
        for axis, classes in answers.items():
            for cls in classes:
                self._classes[(template.module, axis, cls.name)] = cls
                added.append(replace(template, axis=axis, name=cls.name))
        self._offers += added
        return added

    def _load(self, offer: PluginEntry) -> None:
        """Import an entry's module, and check that it offers exactly what its package's entry points declare."""
        if problem := refusal(stated(source_of(offer.module)), offer.source, offer.package):
            raise PluginError(f"{offer.axis}.{offer.name}: {problem}")
        try:
            module = importlib.import_module(offer.module)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{offer.axis}.{offer.name} of {offer.source} cannot be imported (entry point {offer.entry_point}): "
                f"{format_error(error)}. Fix or remove that package, or disable it with `-p no:{offer.package}`"
            ) from error
        said = [o for o in self._offers if (o.module, o.package) == (offer.module, offer.package)]
        axes = self._register(module, offer)
        for axis in sorted({o.axis for o in said} | set(axes)):
            names = {o.name for o in said if o.axis == axis}
            if axis not in axes:
                raise PluginError(
                    f"{offer.source}: {offer.module} has no hook for {axis}, which its entry points name. "
                    f"Add `@hookimpl` above `def {axis}(): return [...]`"
                )
            if not names:
                raise PluginError(f"{offer.source}: {offer.module} has a hook for {axis} and no entry point for it")
        classes = self._ask(module, offer)
        found = {cls.name for cls in classes}
        names = {o.name for o in said if o.axis == offer.axis}
        if found != names:
            raise PluginError(
                f"{offer.source}: {offer.module} offers {_listed(found)} on {offer.axis}, and its entry points declare "
                f"{_listed(names)}. Declare one entry point per name"
            )
        for cls in classes:
            self._classes[(offer.module, offer.axis, cls.name)] = cls

    def _register(self, module: ModuleType, offer: PluginEntry) -> list[str]:
        """Register a module with pluggy once, and return the axes it has hooks for."""
        if self._manager.get_plugin(module.__name__) is None:
            try:
                self._manager.register(module, name=module.__name__)
                self._manager.check_pending()
            except pluggy.PluginValidationError as error:
                hooks = self._manager.get_hookcallers(module) or ()
                unknown = [hook.name for hook in hooks if not hook.has_spec()]
                self._manager.unregister(name=module.__name__)
                if not unknown:
                    raise PluginError(
                        f"{offer.source}: hooks take no arguments: {' '.join(str(error).split())}"
                    ) from error
                raise PluginError(
                    f"{offer.source}: {offer.module} has a hook {unknown[0]!r}, which is not an axis."
                    f"{did_you_mean(unknown[0], AXES)} The axes are: {', '.join(AXES)}"
                ) from error
        # A hook with a spec that is not an axis is deprecated: pluggy has warned of it.
        return [hook.name for hook in self._manager.get_hookcallers(module) or () if hook.name in AXES]

    def _ask(self, module: ModuleType, offer: PluginEntry) -> list[type[Plugin]]:
        """Return the classes that a module offers on an axis, each checked."""
        others = [plugin for plugin in self._manager.get_plugins() if plugin is not module]
        try:
            answers = self._manager.subset_hook_caller(offer.axis, remove_plugins=others)()
        except Exception as error:
            raise PluginError(
                f"{offer.source}: the hook {offer.axis} of {offer.module} fails: {format_error(error)}"
            ) from error
        classes = answers[0] if answers else None
        if not isinstance(classes, list | tuple):
            raise PluginError(
                f"{offer.source}: the hook {offer.axis} of {offer.module} must return a list of classes, got {classes!r}"
            )
        for cls in classes:
            wrong = _misfit(cls, offer.axis)
            if wrong:
                label = getattr(cls, "__name__", repr(cls))
                raise PluginError(
                    f"{offer.source}: {label} in {offer.module} is not a plugin of the axis {offer.axis}: {wrong}"
                )
        return list(classes)


def check_axis(axis: str) -> None:
    """Raise `PluginError` if there is no such axis."""
    if axis not in AXES:
        raise PluginError(f"no axis named {axis!r}.{did_you_mean(axis, AXES)} The axes are: {', '.join(AXES)}")


def _misfit(cls: Any, axis: str) -> str | None:
    """Return why a class is not a plugin of an axis, or None if it is one."""
    base = AXES[axis]
    if not isinstance(cls, type) or not issubclass(cls, base):
        return f"it must be a subclass of hf_rlhf.axes.{base.__name__}"
    if "__dataclass_fields__" not in cls.__dict__ or not all(field.kw_only for field in dataclasses.fields(cls)):
        return "it must be decorated with @dataclass(kw_only=True)"
    if not isinstance(getattr(cls, "name", None), str) or not cls.name or "/" in cls.name:
        return 'it must have a name, for example name = "mine"'
    if inspect.isabstract(cls):
        missing: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
        return f"it must define {', '.join(sorted(missing))}"
    if not isinstance(cls.needs, frozenset):
        return f"needs must be a frozenset of names, got {cls.needs!r}"
    try:
        setting_types(cls)
    except (NameError, AttributeError) as error:
        return f"the type of a setting is unknown at run time ({error}); import it outside of TYPE_CHECKING"
    silent = [field.name for field in settings_of(cls) if not setting_docs(cls).get(field.name)]
    return f"each setting needs a docstring below it; missing: {', '.join(silent)}" if silent else None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


_HOST: Host | None = None


def get_host() -> Host:
    """Return the host of this process, created at the first call."""
    global _HOST
    if _HOST is None:
        _HOST = Host()
    return _HOST


@contextlib.contextmanager
def use_host(host: Host) -> Iterator[Host]:
    """Make `get_host()` return `host` inside the block."""
    global _HOST
    before, _HOST = _HOST, host
    try:
        yield host
    finally:
        _HOST = before
