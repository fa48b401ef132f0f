"""Tables of the settings of other libraries, which error messages quote too."""

from __future__ import annotations

from collections.abc import Iterator

from hf_rlhf.config.mappings import section


def table(system: str, title: str) -> Iterator[str]:
    """Copy a table of `hf_rlhf/config/mappings`."""
    yield section(system, title)
