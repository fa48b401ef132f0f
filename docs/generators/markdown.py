"""Markdown from rows and words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from hf_rlhf.registry.discovery import PluginEntry
from hf_rlhf.registry.host import OWN_PACKAGE, Host
from hf_rlhf.registry.settings_schema import describe


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a Markdown table; `|` in a cell is escaped."""
    lines = [list(header), ["---" for _ in header], *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def folded(title: str, blocks: Iterable[str]) -> str:
    """Format blocks that the site shows when their title is clicked."""
    return f'??? note "{title}"\n\n' + "\n\n".join(textwrap.indent(block, "    ") for block in blocks)


def sentence(text: str | None) -> str:
    """Return the first paragraph on one line."""
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def settings_table(cls: type, base: type | None = None) -> str:
    """List setting, type, default and meaning of a plugin or a section, without those that are as in its base class."""
    rows = [
        [code(s.name), s.type, code(s.default), s.doc] for s in describe(cls) if not base or s not in describe(base)
    ]
    return (
        table(["setting", "type", "default", "meaning"], rows)
        if rows
        else "No settings of its own."
        if base
        else "No settings."
    )


def own_host() -> Host:
    """Create a host with every plugin enabled."""
    return Host(disable="")


def own_plugins(host: Host, axis: str | None = None) -> list[PluginEntry]:
    """Return the plugins of this package, of one axis or of all."""
    return [offer for offer in host.offers(axis) if offer.package == OWN_PACKAGE and not offer.problem]
