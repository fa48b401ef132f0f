"""Keys of a recipe, and its YAML: plain data in which each key occurs once.

Departures from PyYAML's YAML 1.1: `1e-6` is a number, only `true` and `false` are truth values, dates and `1:30` are
text; duplicate keys, tags, anchors and aliases are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from hf_rlhf.axes import AXES, NESTED
from hf_rlhf.config.mappings import meaning
from hf_rlhf.config.offline_sections import OFFLINE_SECTIONS
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.config.training_arguments import argument_names
from hf_rlhf.registry.settings_schema import plain_text, setting_types
from hf_rlhf.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from hf_rlhf.registry.host import Host

TOP_AXES = [axis for axis in AXES if axis not in NESTED and not AXES[axis].axis.watches]
OFFLINE = "trainer"
"""The only axis of a recipe without rollouts."""
STAGES = "stages"
"""The only key of a recipe with stages, which names other recipes; see `hf_rlhf.config.pipeline`."""
ALGORITHM_AXES = [axis for axis in TOP_AXES if axis != OFFLINE]
KEYS = [*TOP_AXES, *SECTIONS, "training"]
OFFLINE_KEYS = [OFFLINE, *OFFLINE_SECTIONS, "training"]
DEFAULTS: dict[str, Any] = {
    axis: [] if AXES[axis].axis.many else AXES[axis].axis.default
    for axis in ALGORITHM_AXES
    if AXES[axis].axis.default is not None
}
"""Plugins of axes that a recipe leaves out. `reference` depends on the rest; see `hf_rlhf.config.recipe_reader`."""


FAMILIES = {
    "groups": "Groups of completions per prompt, no critic",
    "critic": "With a critic",
    "single": "One completion per prompt, no critic",
    "teacher": "Distillation from a teacher",
    "turns": "Several turns, in an environment",
    "offline": "From a dataset, without rollouts",
    "pipeline": "Pipelines of several stages",
}
"""Family of recipes -> its title."""


def family(raw: Mapping[str, Any]) -> str:
    """Return the family of a recipe as written, without importing its plugins."""
    if STAGES in raw or OFFLINE in raw:
        return "pipeline" if STAGES in raw else "offline"
    if raw.get("environment"):
        return "turns"
    rollout = raw.get("rollout")
    if _use(raw, "reference") in ("model", "remote", "with_context"):
        return "teacher"
    if _use(raw, "critic") != "none":
        return "critic"
    several = rollout.get("num_generations", 2) if isinstance(rollout, Mapping) else 2
    return "single" if several == 1 else "groups"


def _use(raw: Mapping[str, Any], axis: str) -> str:
    given = raw.get(axis) or "none"
    return str(given.get("use", "none") if isinstance(given, Mapping) else given)


def unnamed(axis: str, meant: str, given: Mapping[str, Any], host: Host) -> str:
    """Return a hint for settings of an axis without a plugin, which would then be `meant`.

    The hint is empty where `meant` has these settings, or no plugin has.
    """
    fit = [name for name in host.names(axis) if given.keys() <= setting_types(host.get(axis, name)).keys()]
    if not fit or (meant in fit and axis in DEFAULTS):
        return ""
    use, *others = sorted(fit, key=meant.__ne__)
    whole = ", ".join([f"use: {use}", *(f"{name}: {plain_text(value)}" for name, value in given.items())])
    also = f" ({', '.join(others)} would do as well)" if others else ""
    return f". The recipe names no {axis}, so it is {meant}: write {axis}.use={use} too, or {axis}={{{whole}}}{also}"


def unknown_key(name: str, keys: Sequence[str] = KEYS) -> str:
    """Return what a name that is no key of a recipe may mean: an argument of Trainer, a setting of another library, a typo."""
    axis = name.partition(".")[0]
    if axis in AXES and AXES[axis].axis.watches:
        return f" No recipe names a {axis}: every run uses all of them, and `-p no:{axis}.NAME` turns one off."
    if "." not in name and name in argument_names():
        return f" Write training.{name}=..., or the flag --{name}."
    return meaning(name, keys) or did_you_mean(name.partition(".")[0], keys)


class RecipeError(UserError):
    """All problems of a recipe: `problems` holds (dotted path, problem with its fix)."""

    def __init__(self, title: str, problems: list[tuple[str, str]]):
        self.problems = problems
        lines = [f"{path}: {text}" for path, text in problems]
        count = "one problem" if len(lines) == 1 else f"{len(lines)} problems"
        super().__init__("\n  ".join([f"{title} has {count}", *lines]))


FLOAT = re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$")
RESOLVERS = [
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789")),
]


VALUE = re.compile(r"(\s*(?:- )*(?:[\w.-]+: +)?)(\S.*)")
"""A line of YAML: its indentation, dashes and key, and its value."""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _error("a recipe must not have anchors or aliases", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _error(f"the key {key!r} must be text: quote it", key_node.start_mark)
            if key in seen:
                raise _error(f"the key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _error(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, mark)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for tag, pattern, first in RESOLVERS:
    _Loader.add_implicit_resolver(tag, pattern, first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML into plain data. Raises `UserError` with `source`, the line, a pointer into it, and what to quote."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        opened = error.context_mark if re.search("flow|quoted", error.context or "") else None  # what is not closed
        mark = opened if opened and mark and opened.line != mark.line else mark
        if mark is None:
            raise UserError(f"{source}: {error.problem}") from error
        lines = [
            f"{source}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}",
            _pointed(text, mark.line, mark.column),
            _to_quote(text, mark.line, error),
        ]
        raise UserError("\n".join(filter(None, lines))) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
        place = f"line {line + 1}, column {column + 1}"
        raise UserError(
            f"{source}, {place}: the character {text[error.position]!r} is not allowed\n{_pointed(text, line, column)}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: {error}") from error


def _pointed(text: str, line: int, column: int) -> str:
    """Return a line, or 80 characters of it, with `^` below a column."""
    lines = text.split("\n")
    shown = "".join(c if c.isprintable() else " " for c in (lines[line] if line < len(lines) else ""))
    start = max(0, column - 60)
    return f"    {shown[start : start + 80]}\n    {' ' * (column - start)}^"


def _to_quote(text: str, line: int, error: yaml.MarkedYAMLError) -> str:
    """Return what to quote: the line that is YAML once its value is quoted, or the rule."""
    lines = text.split("\n")
    written = lines[line] if line < len(lines) else ""
    indent = written[: -len(written.lstrip())]
    if "\t" in indent:
        return "Indent with spaces, not tabs"
    match = VALUE.fullmatch(written)
    if match and not (match[2][0] in "{[" and ": " in match[2]):  # not a group of settings
        value = match[2].rstrip()
        value = value[1:].removesuffix(value[0]) if value[0] in "\"'" else value
        quoted = match[1] + "'" + value.replace("'", "''") + "'"
        try:
            yaml.load("\n".join([*lines[:line], quoted, *lines[line + 1 :]]), _Loader)  # noqa: S506
        except yaml.YAMLError:
            pass
        else:
            return f"If it is text, quote it: {quoted.strip()}"
    if isinstance(error, yaml.constructor.ConstructorError):
        return ""
    if "<block end>" in str(error.problem):
        return "Keys of a mapping and dashes of a list must begin in the same column"
    return (
        "Text needs quotes if it contains ': ' or ' #', or begins with one of @ ` % * & ! | > { } [ ] , ? - # \" '; "
        "brackets and quotes must be closed"
    )


def write_yaml(data: Any) -> str:
    """Return YAML that `read_yaml` parses into the same data; innermost groups are on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
