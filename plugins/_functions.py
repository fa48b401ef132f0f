"""Loading of users' functions, and plugins that are one: its parameters say what it needs, and the conformance kit what it is."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import SkipTest

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm


def load_function(path: str, kind: str = "reward function") -> Callable[..., Any]:
    """Load the function `file.py:name` or `package.module:name`, leaving `sys.path` unchanged."""
    place, colon, name = path.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"{kind} must be file.py:name or package.module:name, got {path!r}")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ValueError(f"{kind} {path!r}: cannot load {place}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ValueError(f"{kind} {path!r}: {place} has no function {name!r}; it has: {', '.join(names) or 'none'}")
    return function


def _load_file(file: Path) -> Any:
    file = file.expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    title = f"_function_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    specification = importlib.util.spec_from_file_location(title, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[title] = module
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]
        raise
    return module


@dataclass(kw_only=True)
class FromFunction:
    """Base class, before that of the axis, of a plugin whose call is the user's function.

    Parameters beyond those of `GIVEN` are what it `needs`. Properties of the axis are set as attributes of the function:
    `adv.across_groups = False`; what is not set has the value that is never wrong.
    """

    KIND: ClassVar[str]
    GIVEN: ClassVar[tuple[str, ...]]
    """Parameters that every call has."""
    PROPERTIES: ClassVar[tuple[str, ...]] = ()

    function: str | Callable[..., Any]
    """`file.py:name`, `package.module:name`, or the function itself. A recipe's function is imported and run."""

    def __post_init__(self) -> None:
        text = isinstance(self.function, str)
        self._title = self.function if text else getattr(self.function, "__name__", type(self.function).__name__)
        self._function: Callable[..., Any] = load_function(self.function, self.KIND) if text else self.function  # type: ignore
        self._names = list(self._parameters())
        self.needs = frozenset(self._names) - frozenset(self.GIVEN) | frozenset(self._given_needs())
        for name in self.PROPERTIES:
            if hasattr(self._function, name):
                setattr(self, name, getattr(self._function, name))

    def _given_needs(self) -> Iterable[str]:
        """Yield those of `GIVEN` that count as needs if the function names them."""
        return ()

    def _parameters(self) -> Iterator[str]:
        for name, parameter in inspect.signature(self._function).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise ValueError(
                    f"{self.KIND} {self._title}: parameter {parameter} must be a name that can be passed by keyword"
                )
            if parameter.default is parameter.empty or name in self.GIVEN:
                yield name

    def _call(self, values: Mapping[str, Any]) -> Any:
        return self._function(**{name: values[name] for name in self._names})

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield the facts of the axis that do not hold for the function."""
        from hf_rlhf.testing import conformance

        if self.needs - algorithm.provides:  # said elsewhere
            return
        for fact in conformance(self):  # type: ignore[arg-type]
            try:
                fact()
            except SkipTest:
                continue
            except Exception as error:
                yield f"{self.KIND} {self._title}: {str(fact).partition(': ')[2]}: {str(error).strip() or type(error).__name__}"
                return

    def in_words(self) -> str:
        """Return the function's place."""
        return f"the function {self._title}"
