"""Patterns of the run doctor: what each means, when it is found, and what a user sees."""

from __future__ import annotations

from collections.abc import Iterator

from generators.markdown import code, own_host, own_plugins, table
from hf_rlhf.registry.host import OWN_PACKAGE

AXIS = "doctor"


def patterns() -> Iterator[str]:
    """List the patterns with their thresholds."""
    host = own_host()
    found = [host.get(AXIS, f"{OWN_PACKAGE}/{offer.name}") for offer in own_plugins(host, AXIS)]
    rows = [[code(cls.name), f"{cls.meaning[0].upper()}{cls.meaning[1:]}.", f"{cls.rule}."] for cls in found]  # type: ignore[attr-defined]
    yield table(["pattern", "what is wrong", "found where"], rows)
