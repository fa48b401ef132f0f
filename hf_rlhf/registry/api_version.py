"""Plugin API versions: what a module was written for, and whether this version of hf_rlhf can run it.

A module says so in one line, `hf_rlhf_api = "1.0"`, which is read from its source before it is imported: a module of another
API may fail on import with an unrelated error. The first number rises where a correct plugin may break, the second where
something is added. A module without the line is taken to be written for the current version. See docs/api.md.
"""

from __future__ import annotations

import ast
from typing import Any

from packaging.version import InvalidVersion, Version

from hf_rlhf._version import API_VERSION, __version__

STATEMENT = "hf_rlhf_api"


def stated(source: str) -> Any:
    """Return what a module's source assigns to `hf_rlhf_api` at its top level; None if nothing, or if it is not Python."""
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
    """Return why a module that says `said` cannot be used and what to do, or None if it can.

    `who` names the plugin's package (or file) with its version; `package` is its name for pip, None for a file.
    """
    if said is None:
        return None
    own, wanted = Version(API_VERSION), _parsed(said)
    if wanted is None:
        return f'{who}: {STATEMENT} must be a version such as "{API_VERSION}", got {said!r}'
    here = f"hf_rlhf {__version__} has {API_VERSION}"
    if wanted > own:
        return (
            f"{who} was written for plugin API {said}, and {here}: install a newer hf_rlhf (`pip install -U hf_rlhf`)"
            + (f", or an older {package} for API {own.major}" if package else "")
        )
    if wanted.major < own.major:
        other = (
            f"install a {package} for API {own.major} (`pip install -U {package}`)" if package else "update the file"
        )
        return (
            f"{who} was written for plugin API {said}, and {here}: {other}; CHANGELOG.md says what changed, under API"
        )
    return None


def _parsed(said: Any) -> Version | None:
    """Return `said` as a version of exactly two numbers, otherwise None."""
    try:
        version = Version(said) if isinstance(said, str) else None
    except InvalidVersion:
        return None
    return version if version and len(version.release) == 2 and version.base_version == said else None
