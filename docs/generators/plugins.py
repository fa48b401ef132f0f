"""Plugins: a table for each axis, and every plugin with its settings and metrics."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from generators.markdown import code, folded, own_host, own_plugins, sentence, settings_table, table
from hf_rlhf.axes import AXES, LISTS, NESTED
from hf_rlhf.config.recipe_yaml import DEFAULTS, OFFLINE
from hf_rlhf.metrics import declared_by
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.host import OWN_PACKAGE, Host
from hf_rlhf.registry.settings_schema import describe, nested, setting_types, settings_of

PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")


def papers(text: str) -> str:
    """Links to the papers that a text names."""
    found = dict.fromkeys(PAPER.findall(text))
    return ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in found)


def index() -> Iterator[str]:
    """For each axis what it is and its plugins, a line for each."""
    host = own_host()
    for axis in AXES:
        summary = (getattr(hookspecs, axis).__doc__ or "").partition("\n")[0]
        yield f"## {axis}\n\n{summary} {_place(host, axis)}"
        rows = []
        for offer in own_plugins(host, axis):
            cls = host.get(axis, f"{OWN_PACKAGE}/{offer.name}")
            said = PAPER.sub(r"[\g<0>](https://arxiv.org/abs/\1)", sentence(sys.modules[cls.__module__].__doc__))
            rows.append([f"[`{offer.name}`](../{_file(offer.module)})", said])
        yield table(["plugin", "what it is"], rows)


def reference() -> Iterator[str]:
    """Return the section of every plugin, by axis: computation, paper, needs, settings, metrics and file."""
    host = own_host()
    for axis, base in AXES.items():
        yield f"## {axis}\n\n{hookspecs.summary(axis)} {_place(host, axis)}"
        if describe(base):
            yield f"Settings of each, unless it lists another default:\n\n{settings_table(base)}"
        yield from _of_axis(host, axis, base)


def _of_axis(host: Host, axis: str, base: type) -> Iterator[str]:
    for offer in own_plugins(host, axis):
        cls = host.get(offer.axis, f"{OWN_PACKAGE}/{offer.name}")
        file = _file(offer.module)
        first, rest = (inspect.getdoc(cls) or "").partition("\n\n")[::2]
        yield f"### {offer.axis}.{offer.name}\n\n{first} Source: [{file}](../{file}).\n\n{rest}".rstrip()
        yield inspect.getdoc(sys.modules[cls.__module__]) or ""
        said = [("Needs", _names(cls, "needs")), ("Provides", _names(cls, "provides"))]
        if any(names for _, names in said):
            yield " ".join(f"{title}: {names}" for title, names in said if names)
        yield settings_table(cls, base)
        if cls.metrics:
            logged = [
                [code(each), metric.unit, metric.meaning] for each, metric in declared_by(cls, offer.axis).items()
            ]
            yield folded("Metrics", [table(["metric", "unit", "meaning"], logged)])


def _file(module: str) -> str:
    return module.replace("hf_rlhf_plugins", "plugins").replace(".", "/") + ".py"


def _names(cls: type, attribute: str) -> str:
    """Return what a plugin needs or provides; if that depends on its settings, the property's docstring."""
    names: Any = getattr(cls, attribute)
    if isinstance(names, property):
        return " ".join((names.__doc__ or "").split())
    return ", ".join(map(code, sorted(names))) + "." if names else ""


def _place(host: Host, axis: str) -> str:
    """Describe the number of an axis's plugins in a recipe, their place, and the default."""
    if axis in NESTED:
        return _inside(host, axis)
    if AXES[axis].axis.watches:
        return "Every run watches for all of them; no recipe names one. See [doctor.md](doctor.md)."
    if axis == OFFLINE:
        return "See [reward_models.md](reward_models.md)."
    place, default = f"A recipe has {'any number' if axis in LISTS else 'one'}.", DEFAULTS.get(axis)
    if axis == "reference":
        return f"{place} Left out, it is `none` where no KL is measured, `adapter_off` with LoRA, else `frozen`."
    return place if default is None or axis in LISTS else f"{place} Left out, it is `{default}`."


def _inside(host: Host, axis: str) -> str:
    """Describe the same for an axis whose plugins are nested in others."""
    named: dict[str, list[str]] = {}
    for offer in own_plugins(host):
        cls = host.get(offer.axis, f"{OWN_PACKAGE}/{offer.name}")
        for setting in settings_of(cls):
            held = nested(setting_types(cls)[setting.name])
            if held and held.axis == axis and not held.many:
                named.setdefault(setting.metadata.get("use", ""), []).append(code(f"{offer.axis}.{offer.name}"))
    place = f"A setting of {', '.join(name for names in named.values() for name in names)}."
    if list(named) == [""]:
        return f"{place} It cannot be left out."
    if len(named) == 1:
        return f"{place} Left out, it is `{next(iter(named))}`."
    said = [f"{code(default)} in {', '.join(where)}" for default, where in named.items() if default]
    return f"{place} Left out, it is {'; '.join(said)}."
