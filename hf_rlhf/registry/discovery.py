"""Discover plugins and recipes from the metadata and files of installed packages, without importing them.

A plugin is an entry point of group `hf_rlhf`, named `axis.name`, whose value is a module. Recipes are the YAML files of
a package that an entry point of group `hf_rlhf.recipes` names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from hf_rlhf._version import __version__
from hf_rlhf.axes import AXES
from hf_rlhf.runtime.errors import UserError, did_you_mean

GROUP = "hf_rlhf"
RECIPES = "hf_rlhf.recipes"


class PluginError(UserError):
    """Error for a plugin that cannot be found, imported or used. The message names the package and its version."""


@dataclass(frozen=True, kw_only=True)
class PluginEntry:
    """A plugin that a package or a file offers, as known without importing it."""

    axis: str
    name: str
    module: str
    package: str
    """Name of the distribution, or the path of a one-off file."""
    version: str
    """Version of the distribution, or the first 12 digits of the file's SHA-256."""
    file: Path | None = None
    """The one-off file."""
    problem: str | None = None
    """Reason why it cannot be used: it is disabled, or its entry point is invalid."""

    @property
    def source(self) -> str:
        """Package and version, or file and digest, for messages."""
        return f"file {self.package} (sha256 {self.version})" if self.file else f"{self.package} {self.version}"

    @property
    def entry_point(self) -> str:
        """The line of pyproject.toml that declares it."""
        return f'"{self.axis}.{self.name}" = "{self.module}"'


@dataclass(frozen=True, kw_only=True)
class RecipeEntry:
    """A recipe that a package offers."""

    name: str
    package: str
    version: str
    file: Path
    summary: str
    """The first sentence of the comment at its top: the paper."""
    problem: str | None = None

    @property
    def source(self) -> str:
        """Package and version, or file and digest, for messages."""
        return f"{self.package} {self.version}"


Entry = TypeVar("Entry", PluginEntry, RecipeEntry)


def distributions() -> Iterator[tuple[str, str, list[metadata.EntryPoint], str | None]]:
    """Yield name, version, entry points and problem (None if usable) of each package with plugins or recipes.

    Each package is listed once, although an editable install appears twice.
    """
    seen = set()
    for distribution in metadata.distributions():
        if GROUP not in (distribution.read_text("entry_points.txt") or ""):
            continue
        name, version = str(distribution.metadata["Name"]), str(distribution.metadata["Version"])
        if canonicalize_name(name) in seen:
            continue
        seen.add(canonicalize_name(name))
        try:
            points = [point for point in distribution.entry_points if point.group in (GROUP, RECIPES)]
        except Exception as error:  # whatever importlib.metadata stumbles over in a stranger's file
            yield name, version, [], f"invalid entry points ({format_error(error)})"
        else:
            if points:
                yield name, version, points, _unmet(distribution)


def _unmet(distribution: metadata.Distribution) -> str | None:
    """Return which version of hf_rlhf a package requires, if this is another one.

    pip checks this when it installs the package, but not when it installs another hf_rlhf later.
    """
    for line in distribution.metadata.get_all("Requires-Dist") or ():
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        own = canonicalize_name(wanted.name) == canonicalize_name(GROUP)
        if (
            own
            and (wanted.marker is None or wanted.marker.evaluate({"extra": ""}))
            and not wanted.specifier.contains(__version__, prereleases=True)
        ):
            return f"it requires hf_rlhf{wanted.specifier}, and {__version__} is installed: `pip install -U` one of the two"
    return None


def plugin_entry(point: metadata.EntryPoint, package: str, version: str) -> PluginEntry:
    """Return the plugin of an entry point, with a problem if it is not `axis.name = module`."""
    axis, dot, name = point.name.partition(".")
    problem = None
    if not dot or not name:
        problem = f"the entry point {point.name!r} must be written axis.name"
    elif axis not in AXES:
        problem = f"unknown axis {axis!r}.{did_you_mean(axis, AXES)}"
    elif not re.fullmatch(r"[\w.]+", point.value.strip()):
        problem = f"the entry point {point.name!r} must name a module, got {point.value!r}"
    return PluginEntry(
        axis=axis, name=name, module=point.value.strip(), package=package, version=version, problem=problem
    )


def recipe_entries(module: str, package: str, version: str) -> Iterator[RecipeEntry]:
    """Yield the recipes in the folders of a package."""
    for folder in _folders(module):
        for file in sorted(folder.glob("*.yaml")):
            summary = _first_sentence(file.read_text(encoding="utf-8", errors="replace"))
            yield RecipeEntry(name=file.stem, package=package, version=version, file=file, summary=summary)


def _first_sentence(recipe: str) -> str:
    """Return the first sentence of a recipe's comment, without a line for editors."""
    lines = takewhile(lambda line: line.startswith("#"), recipe.splitlines())
    text = " ".join(line.lstrip("# ").rstrip() for line in lines if not line.startswith("# yaml-language-server:"))
    return re.split(r"(?<!\bDr\.)(?<!\bal\.)(?<=\.)\s", text, maxsplit=1)[0]


def _folders(module: str) -> list[Path]:
    spec = spec_of(module)
    return [Path(folder) for folder in (spec.submodule_search_locations or () if spec else ())]


def spec_of(module: str) -> ModuleSpec | None:
    """Find a module's spec without importing it or its parent packages."""
    path: list[str] | None = None
    spec = None
    for end in range(1, module.count(".") + 2):
        name = ".".join(module.split(".")[:end])
        found = (_find(finder, name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec), None)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _find(finder: Any, name: str, path: list[str] | None) -> ModuleSpec | None:
    try:
        spec: ModuleSpec | None = finder.find_spec(name, path)
    except KeyError:  # a folder without __init__.py: Python asks for the package around it, which is not imported
        spec = ModuleSpec(name, None, is_package=True)
        folders = (Path(folder) / name.rpartition(".")[2] for folder in path or ())
        spec.submodule_search_locations = [str(folder) for folder in folders if folder.is_dir()]
    return spec


def source_of(module: str) -> str:
    """Return a module's source without importing it; empty if there is none to read."""
    spec = spec_of(module)
    file = Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
    return file.read_text(encoding="utf-8", errors="replace") if file and file.is_file() else ""


def resolve(
    entries: Sequence[Entry], name: str, kind: str, usable: list[str], otherwise: Callable[[str], str] = lambda name: ""
) -> Entry:
    """Return the entry that `name` or `package/name` means. Raise `PluginError` if it is none or more than one.

    `otherwise` returns what a name without its package means elsewhere, in place of near names.
    """
    package, _, bare = name.rpartition("/")
    named = sorted((entry for entry in entries if entry.name == bare), key=lambda entry: (entry.package, entry.version))
    hits = [entry for entry in named if not package or is_from(entry, package)]
    open_hits = [entry for entry in hits if not entry.problem]
    if len(open_hits) == 1:
        return open_hits[0]
    if open_hits:
        said = " and ".join(entry.source for entry in open_hits)
        ways = " or ".join(f"`{entry.package}/{entry.name}`" for entry in open_hits)
        raise PluginError(f"the {kind} {name!r} is offered by {said}. Choose one: {ways}")
    if hits:
        raise PluginError(f"the {kind} {name!r} of {hits[0].source} cannot be used: {hits[0].problem}")
    others = [entry.source for entry in named]
    elsewhere = f" {bare!r} is offered by {' and '.join(others)}." if others else ""
    elsewhere = elsewhere or otherwise(bare) or did_you_mean(bare, usable)
    raise PluginError(f"no {kind} named {name!r}.{elsewhere} There are: {', '.join(usable) or 'none'}")


def is_from(entry: PluginEntry | RecipeEntry, package: str) -> bool:
    """Return whether a package, or a one-off file of this name, offers an entry."""
    if isinstance(entry, PluginEntry) and entry.file:
        return package in (entry.package, entry.file.name)
    return canonicalize_name(entry.package) == canonicalize_name(package)


def format_error(error: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {error}"
