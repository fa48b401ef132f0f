"""`pytest --hf-rlhf-plugin PACKAGE`: run the conformance kit on every plugin of an installed package.

Each fact about each plugin with its default settings is a test. Plugins without defaults, or that need `setup`, are
skipped with a reason that says how to test them. Without paths on the command line nothing else runs, and without the
option nothing is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import pytest

if TYPE_CHECKING:
    from hf_rlhf.axes import Plugin
    from hf_rlhf.registry.discovery import PluginEntry
    from hf_rlhf.testing import Fact

OPTION = "--hf-rlhf-plugin"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("hf_rlhf").addoption(
        OPTION,
        action="append",
        default=[],
        metavar="PACKAGE",
        help="run the conformance kit of hf_rlhf on every plugin of this installed package, or of this FILE.py; repeatable",
    )


def _asked(config: pytest.Config) -> list[str]:
    names: list[str] = config.getoption(OPTION)
    return names


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect nothing else if no path was given."""
    given = config.args_source is pytest.Config.ArgsSource.ARGS
    return True if _asked(config) and not given else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the facts, before -k and other options select tests."""
    for name in _asked(config):
        for offer in _offers(name):
            key = f"{offer.axis}.{offer.name}"
            node = PluginFacts.from_parent(session, name=key, nodeid=f"{name}::{key}", offer=offer)
            report = node.ihook.pytest_make_collect_report(collector=node)
            node.ihook.pytest_collectreport(report=report)
            items.extend(report.result)


def _offers(name: str) -> list[PluginEntry]:
    """Return the plugins of a package or a file. Raise `pytest.UsageError` if there are none."""
    from hf_rlhf.conformance.subjects import entries_of
    from hf_rlhf.registry.host import get_host
    from hf_rlhf.runtime.errors import UserError

    try:
        return entries_of(get_host(), name)
    except UserError as error:
        raise pytest.UsageError(f"{OPTION}: {error}") from error


class PluginFacts(pytest.Collector):
    """Collector of the facts about one plugin."""

    def __init__(self, offer: PluginEntry, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offer = offer
        self.plugin: Plugin | None = None

    def collect(self) -> Iterator[pytest.Item]:
        """Yield one test per fact; one skipped or failing test if the plugin cannot be made."""
        from hf_rlhf.conformance.subjects import make_plugin
        from hf_rlhf.registry.host import get_host
        from hf_rlhf.testing import conformance

        try:
            self.plugin = make_plugin(get_host(), self.offer)
            facts: list[Any] = conformance(self.plugin)
        except Exception as error:  # a stranger's module may raise anything
            facts = [_Unmade(f"{self.offer.axis}.{self.offer.name}", error)]
        for fact in facts:
            yield FactItem.from_parent(self, name=str(fact).partition(": ")[2] or "it can be made", fact=fact)

    def teardown(self) -> None:
        """Close the plugin."""
        if self.plugin is not None:
            self.plugin.close()


class _Unmade:
    """Fact about a plugin that could not be made; calling it raises the reason."""

    def __init__(self, title: str, error: Exception) -> None:
        self.title, self.error = title, error

    def __call__(self) -> None:
        raise self.error

    def __str__(self) -> str:
        return f"{self.title}: it can be made with its default settings"


class FactItem(pytest.Item):
    """Test of one fact."""

    def __init__(self, fact: Fact, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fact = fact

    def runtest(self) -> None:
        """Call the fact."""
        try:
            self.fact()
        except SkipTest as error:
            pytest.skip(str(error))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the failure in one sentence, with the traceback if the plugin itself raised."""
        from hf_rlhf.runtime.errors import UserError

        if isinstance(excinfo.value, AssertionError | UserError):
            return f"{self.fact}\n  {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return the location for reports."""
        return self.path, None, self.nodeid
