"""`hf-rlhf plugins check`: inspect the plugins of a package or a file, and run the conformance kit on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any
from unittest import SkipTest

import typer
from packaging.utils import canonicalize_name

from hf_rlhf._version import API_VERSION, __version__
from hf_rlhf.cli.app import PluginOptions, plugins_app
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json
from hf_rlhf.conformance.subjects import entries_of, make_plugin
from hf_rlhf.registry.discovery import PluginEntry, RecipeEntry, format_error, source_of
from hf_rlhf.registry.host import Host, get_host
from hf_rlhf.registry.settings_schema import describe
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.plain_text import indented

if TYPE_CHECKING:
    from hf_rlhf.axes import Plugin


@dataclass(kw_only=True)
class PluginReport:
    """Findings about one plugin."""

    axis: str
    name: str
    module: str
    api: str | None = None
    """Version of the plugin API that its module declares."""
    doc: str = ""
    needs: list[str] = field(default_factory=list)
    provides: list[str] = field(default_factory=list)
    settings: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Logged name -> declaration."""
    facts: list[dict[str, str]] = field(default_factory=list)
    """Each with `fact`, `result` (holds, fails or skipped) and the message `said`."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Reasons why it cannot be used, each with a fix."""

    @property
    def failed(self) -> bool:
        """True if the plugin has a problem or a false fact."""
        return bool(self.problems) or any(fact["result"] == "fails" for fact in self.facts)


@plugins_app.command(
    "check",
    short_help="Check the plugins of a package, or of a file.",
    epilog=examples(
        "hf-rlhf plugins check hf-rlhf-best-of      # an installed package, with pip install -e . too",
        "hf-rlhf plugins check ./best_of.py",
        "hf-rlhf plugins check hf-rlhf-best-of --json",
    ),
)
def check(
    target: Annotated[str, typer.Argument(metavar="PACKAGE|FILE.py", help="An installed package, or a file.")],
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Show what the host sees of a package's plugins (names, settings, metrics, API version, recipes) and the result of the
    conformance kit. Imports the plugins. The exit code is 1 if anything fails."""
    host = get_host()
    with output_to_stderr(), _own_warnings() as said:
        offers = entries_of(host, target)
        found = [look_at(host, offer) for offer in offers]
        recipes = {recipe.name: list(recipe_problems(recipe)) for recipe in host.recipes() if _is_of(recipe, offers[0])}
    failed = any(each.failed for each in found) or any(recipes.values())
    if as_json:
        first = {"package": offers[0].package, "version": offers[0].version, "hf_rlhf": __version__, "api": API_VERSION}
        plain = [{**asdict(each), "failed": each.failed} for each in found]
        print_json({**first, "plugins": plain, "recipes": recipes, "warnings": said, "failed": failed})
    else:
        print(f"{offers[0].source}; hf_rlhf {__version__} has plugin API {API_VERSION}")
        for each in found:
            show(each)
        for name, problems in recipes.items():
            print(f"\nrecipe {name}: " + ("; ".join(problems) or "it makes a valid algorithm"))
        for line in said:
            print(f"\nwarning: {indented(line)}")
        print("\n" + ("Some checks failed, see above." if failed else "All checks passed."))
    if failed:
        raise typer.Exit(1)


def look_at(host: Host, offer: PluginEntry) -> PluginReport:
    """Inspect one plugin. An exception in its module becomes a problem."""
    found = PluginReport(axis=offer.axis, name=offer.name, module=offer.module)
    if offer.problem:
        found.problems.append(f"{offer.entry_point} cannot be used: {offer.problem}")
        return found
    try:
        cls = host.get(offer.axis, f"{offer.package}/{offer.name}")
        _describe(cls, offer, found)
    except Exception as error:  # a stranger's module may raise anything
        found.problems.append(str(error) if isinstance(error, UserError) else format_error(error))
        return found
    for title, result, said in _facts(host, offer):
        found.facts.append({"fact": title, "result": result, "said": said})
    return found


def _describe(cls: type[Plugin], offer: PluginEntry, found: PluginReport) -> None:
    import inspect

    from hf_rlhf.metrics import declared_by
    from hf_rlhf.registry.api_version import STATEMENT, stated

    source = offer.file.read_text(encoding="utf-8") if offer.file else source_of(offer.module)
    found.api = stated(source)
    if found.api is None:
        found.warnings.append(
            f'its module does not declare its plugin API. Add {STATEMENT} = "{API_VERSION}", so that other versions of hf_rlhf '
            "can check it"
        )
    found.doc = inspect.getdoc(cls) or ""
    found.needs, found.provides = (_names(getattr(cls, title)) for title in ("needs", "provides"))
    found.settings = [setting._asdict() for setting in describe(cls)]
    found.metrics = {name: asdict(metric) for name, metric in declared_by(cls, offer.axis).items()}


def _names(declared: Any) -> list[str]:
    """Return what a class declares in `needs` or `provides`; a property depends on the settings."""
    return sorted(declared) if isinstance(declared, frozenset) else ["(depends on its settings)"]


def _facts(host: Host, offer: PluginEntry) -> Iterator[tuple[str, str, str]]:
    """Yield (fact, result, message) of the conformance kit with the default settings; see `PluginReport.facts`."""
    from hf_rlhf.testing import conformance

    try:
        plugin = make_plugin(host, offer)
    except SkipTest as skip:
        yield "the conformance kit", "skipped", str(skip)
        return
    except Exception as error:
        yield "it can be made with its default settings", "fails", format_error(error)
        return
    try:
        for fact in conformance(plugin):
            title = str(fact).partition(": ")[2]
            try:
                fact()
            except SkipTest as skip:
                yield title, "skipped", str(skip)
            except Exception as error:
                yield title, "fails", str(error) if isinstance(error, AssertionError) else format_error(error)
            else:
                yield title, "holds", ""
    finally:
        plugin.close()


def recipe_problems(recipe: RecipeEntry) -> Iterator[str]:
    """Yield reasons why a recipe of the package cannot run, each with what to write instead."""
    from hf_rlhf.config.offline_sections import OfflineDataset
    from hf_rlhf.config.recipe import load_recipe

    if recipe.problem:
        yield recipe.problem
        return
    try:
        loaded = load_recipe(f"{recipe.package}/{recipe.name}")
        if not isinstance(getattr(loaded, "rows", None), OfflineDataset):
            yield from loaded.algorithm().problems()
    except Exception as error:
        yield str(error) if isinstance(error, UserError) else format_error(error)


def _is_of(recipe: RecipeEntry, offer: PluginEntry) -> bool:
    return not offer.file and canonicalize_name(recipe.package) == canonicalize_name(offer.package)


class _own_warnings:
    """Collect deprecation warnings about hooks once each, instead of printing them."""

    def __enter__(self) -> list[str]:
        self._said: list[str] = []
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("default")
        return self._said

    def __exit__(self, *error: Any) -> None:
        kinds = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
        own = [str(each.message) for each in self._caught or () if issubclass(each.category, kinds)]
        self._said += dict.fromkeys(text for text in own if "hf_rlhf" in text or "hook" in text)
        self._catch.__exit__(*error)


def show(found: PluginReport) -> None:
    """Print the report of one plugin."""
    print(f"\n{found.axis}.{found.name}  ({found.module}, API {found.api or 'not declared'})")
    print(f"  {found.doc.partition(chr(10))[0]}")
    for title in ("needs", "provides"):
        if names := getattr(found, title):
            print(f"  {title}: {', '.join(names)}")
    for setting in found.settings:
        print(f"  setting {setting['name']}: {setting['type']}, default {setting['default']}. {setting['doc']}")
    for name, metric in found.metrics.items():
        print(f"  metric {name}: {metric['unit']}. {metric['meaning']}")
    for fact in found.facts:
        if fact["result"] != "holds":
            print(f"  {fact['result'].upper()}: {fact['fact']}\n    {indented(fact['said'])}")
    holding = sum(fact["result"] == "holds" for fact in found.facts)
    print(f"  {holding} of {len(found.facts)} facts hold")
    for text in found.warnings:
        print(f"  warning: {indented(text)}")
    for text in found.problems:
        print(f"  PROBLEM: {indented(text)}")
