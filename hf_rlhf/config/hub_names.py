"""Look up the models, tokenizers and datasets that settings name, before anything is loaded."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from hf_rlhf.registry.settings_schema import setting_types
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.hub import OnHub, unavailable

MADE_LATER = ("builtin:", "stage:")
"""Beginnings of names that are neither paths nor repositories."""


def check_hub_names(named: Iterable[tuple[str, Any]]) -> None:
    """Raise `UserError` for settings of plugins and sections, given with their dotted paths, that name what is not there."""
    problems = [problem for path, settings in named for problem in _missing(path, settings)]
    if problems:
        raise UserError("\n".join(problems))


def _missing(path: str, settings: Any) -> Iterator[str]:
    for setting, hint in setting_types(type(settings)).items():
        value = getattr(settings, setting)
        mark = next(_marks(hint), None)
        if mark is None or not isinstance(value, str) or value in _literals(hint) or value.startswith(MADE_LATER):
            continue
        revision = None if mark.kind == "tokenizer" else getattr(settings, "revision", None)
        if problem := unavailable(value, mark.kind, revision):
            yield f"{path}.{setting}: {problem}"


def _marks(hint: Any) -> Iterator[OnHub]:
    if typing.get_origin(hint) is Annotated:
        yield from (mark for mark in typing.get_args(hint) if isinstance(mark, OnHub))
    else:
        for part in typing.get_args(hint):
            yield from _marks(part)


def _literals(hint: Any) -> set[Any]:
    """Return the words of a setting that are not names."""
    return {x for part in typing.get_args(hint) if typing.get_origin(part) is Literal for x in typing.get_args(part)}
