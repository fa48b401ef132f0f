"""Patterns of the run doctor: what each means, when it is found, and what a user sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from generators.markdown import code, own_host, own_plugins, table
from hf_rlhf.metrics import CORE
from hf_rlhf.registry.host import OWN_PACKAGE

AXIS = "doctor"


def patterns() -> Iterator[str]:
    """List the patterns with their thresholds."""
    rows = [[code(cls.name), _meaning(cls), f"{cls.rule}."] for cls in _classes()]
    yield table(["pattern", "what is wrong", "found where"], rows)


def symptoms() -> Iterator[str]:
    """Return what a user sees, by pattern, with what people change about the metrics that it covers."""
    known = {metric.name: metric for metric in CORE}
    for cls in _classes():
        changes = [known[name].unhealthy for name in sorted(cls.covers) if name in known]
        changes = [text for text in changes if not text.startswith("As `")]
        yield f"### {cls.symptom}\n\n{_meaning(cls)} ([`{cls.name}`](doctor.md#patterns))"
        yield " ".join(changes) or f"Found where {cls.rule}."


def _classes() -> list[Any]:
    host = own_host()
    return [host.get(AXIS, f"{OWN_PACKAGE}/{offer.name}") for offer in own_plugins(host, AXIS)]


def _meaning(cls: Any) -> str:
    return f"{cls.meaning[0].upper()}{cls.meaning[1:]}."
