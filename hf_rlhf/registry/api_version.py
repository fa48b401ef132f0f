"""Which version of the plugin API a module was written for, and whether this host can run it.

A plugin's module says so in one line, `hf_rlhf_api = "1.0"`. It is read from the source, before the module is imported: a
module of another API may fail to import with an error that says nothing of the reason. The first number rises where a
plugin that was right may become wrong, the second where something is added. A module that says nothing is taken to be
written for the version at hand; docs/api.md lists what the version stands for.
"""

from __future__ import annotations

import ast
from typing import Any

from hf_rlhf._version import API_VERSION, __version__

STATEMENT = "hf_rlhf_api"


def stated(source: str) -> Any:
    """What a module's source assigns to `hf_rlhf_api` at its top level; None where it says nothing or is no Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None  # the import says what is wrong
    for line in body:
        targets = (
            line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == STATEMENT for target in targets):
            value = getattr(line, "value", None)
            return value.value if isinstance(value, ast.Constant) else ast.unparse(value) if value else ""
    return None


def refusal(said: Any, who: str, package: str | None) -> str | None:
    """Why a module that says `said` cannot be used, with what to do; None where it can.

    `who` names the plugin's package (or file) with its version, `package` what pip knows it by, None for a file.
    """
    if said is None:
        return None
    own = _parts(API_VERSION)
    wanted = _parts(said)
    if own is None or wanted is None:
        return f'{who}: {STATEMENT} is {said!r}; write the version it was written for as text, {STATEMENT} = "{API_VERSION}"'
    here = f"hf_rlhf {__version__} has {API_VERSION}"
    if wanted > own:
        return (
            f"{who} was written for plugin API {said}, and {here}: install a newer hf_rlhf (`pip install -U hf_rlhf`)"
            + (f", or an older {package} for API {own[0]}" if package else "")
        )
    if wanted[0] < own[0]:
        other = (
            f"install a {package} for API {own[0]} (`pip install -U {package}`)"
            if package
            else "bring the file up to date"
        )
        return (
            f"{who} was written for plugin API {said}, and {here}: {other}; CHANGELOG.md says what changed, under API"
        )
    return None


def _parts(version: Any) -> tuple[int, int] | None:
    numbers = version.split(".") if isinstance(version, str) else []
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        return None
    return int(numbers[0]), int(numbers[1])
