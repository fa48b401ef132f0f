"""Commands that list and explain: plugins, recipes, show, explain."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Annotated, Any

import typer

from hf_rlhf.axes import AXES
from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app, plugins_app, recipes_app
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json, table
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.discovery import RecipeEntry
from hf_rlhf.registry.host import Host, check_axis, get_host
from hf_rlhf.registry.settings_schema import Setting, describe
from hf_rlhf.runtime.errors import UserError, did_you_mean


@plugins_app.callback()
def plugins(context: typer.Context, as_json: Json = False, plugin: PluginOptions = None) -> None:
    """List the installed plugins, without importing them."""
    if context.invoked_subcommand:
        return
    rows = [[o.axis, o.name, o.package, o.version, problem or ""] for o, problem in offered(get_host())]
    header = ["axis", "name", "package", "version", "problem"]
    if as_json:
        print_json([dict(zip(header, [*row[:4], row[4] or None], strict=True)) for row in rows])
    else:
        table(header, rows)


def offered(host: Host) -> list[tuple[Any, str | None]]:
    """Return every plugin with its problem: it cannot be used, or its name is ambiguous."""
    counts = Counter((offer.axis, offer.name) for offer in host.offers() if not offer.problem)
    found = []
    for offer in host.offers():
        clash = counts[offer.axis, offer.name] > 1 and not offer.problem
        said = f"ambiguous name: write {offer.package}/{offer.name}" if clash else offer.problem
        found.append((offer, said))
    return found


@recipes_app.callback()
def recipes(context: typer.Context, as_json: Json = False, plugin: PluginOptions = None) -> None:
    """List the installed recipes, or show one."""
    if context.invoked_subcommand:
        return
    from hf_rlhf.config.recipe_yaml import FAMILIES

    found = [(_family(recipe), recipe) for recipe in get_host().recipes()]
    if as_json:
        keys = ("name", "package", "version", "file", "summary", "problem")
        print_json([{**{key: getattr(recipe, key) for key in keys}, "family": family} for family, recipe in found])
        return
    rows = [(family, [r.name, r.source, r.problem or r.summary]) for family, r in found]
    if not sys.stdout.isatty():
        table(["recipe", "family", "package", "what it is"], [[row[0], family, *row[1:]] for family, row in rows])
        return
    foreign = any(package != rows[0][1][1] for _, (_, package, _) in rows)
    for family, title in FAMILIES.items():
        own = [row if foreign else [row[0], row[2]] for of, row in rows if of == family]
        if own:
            table(["recipe", *(["package"] if foreign else []), "what it is"], own, title)


def _family(recipe: RecipeEntry) -> str:
    from hf_rlhf.config.recipe_yaml import FAMILIES, family, read_yaml

    try:
        raw = read_yaml(recipe.file.read_text(encoding="utf-8", errors="replace"), recipe.name)
    except UserError:
        raw = None  # showing or running it says why
    return family(raw) if isinstance(raw, dict) else next(iter(FAMILIES))


@recipes_app.command(
    "show", epilog=examples("hf-rlhf recipes show grpo", "hf-rlhf recipes show hf_rlhf/ppo > mine.yaml")
)
def recipes_show(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A recipe, or package/recipe.", autocompletion=completion.recipe_names),
    ],
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Print the text of a recipe, to start your own from. Its first line names the file of `hf-rlhf schema` to editors."""
    if as_json:
        from hf_rlhf.config.recipe import read_recipe

        print_json(read_recipe(name))
    else:
        from hf_rlhf.config.json_schema import HEADER

        text = get_host().find_recipe(name).file.read_text(encoding="utf-8")
        print(text if text.startswith(HEADER) else HEADER + text, end="")


@app.command(
    short_help="Explain a plugin and its settings, or an axis.",
    epilog=examples(
        "hf-rlhf show advantages gae               # formula, paper, settings",
        "hf-rlhf show rewards                      # the axis: its names, and a complete plugin as an example",
        "hf-rlhf show policy_loss ppo_clip --json",
    ),
)
def show(
    axis: Annotated[
        str,
        typer.Argument(
            metavar="AXIS",
            help="An axis, or a plugin that only one axis has. The axes: " + ", ".join(AXES),
            autocompletion=completion.axes,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A plugin, or package/plugin.", autocompletion=completion.names_of_axis),
    ] = None,
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Explain a plugin and its settings; without NAME, an axis, with a complete plugin as an example."""
    host = get_host()
    if axis not in AXES:
        axis, name = (name, axis) if name in AXES else (axis, name) if name else _with_axis(host, axis)
    check_axis(axis)
    if name is not None:
        _show_plugin(host, axis, name, as_json)
        return
    doc, names, example = hookspecs.summary(axis), host.names(axis), hookspecs.example(axis)
    if as_json:
        print_json({"axis": axis, "what": doc, "names": names, "example": example})
    else:
        print(f"{axis}: {doc}\n\nnames: {', '.join(names)}\n\nA plugin of your own:\n")
        print(example, end="")


@app.command(
    short_help="Show what a recipe computes, on a small example.",
    epilog=examples(
        "hf-rlhf explain grpo                              # one recipe on the example, step by step",
        "hf-rlhf explain grpo@verl grpo@trl                # where two differ, in settings and numbers",
        "hf-rlhf explain grpo dr_grpo kl=[]                # overrides hold for both",
        "hf-rlhf explain grpo rloo --json",
    ),
)
def explain(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [RECIPE] [KEY=VALUE]...",
            help="One recipe or two, and overrides.",
            autocompletion=completion.recipes_and_overrides,
        ),
    ],
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Show what a recipe computes, step by step on a small example; with two recipes, how they differ."""
    from hf_rlhf.lab.explain import as_plain
    from hf_rlhf.lab.explain import explain as run

    if as_json:
        with output_to_stderr():
            found = as_plain(*split_names(words))
        print_json(found)
    else:
        run(*split_names(words))


def split_names(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the one or two recipes among the words, and the overrides. Raise `UserError` for any other number."""
    names = [word for word in words if "=" not in word]
    if len(names) not in (1, 2):
        raise UserError(
            f"explain takes one recipe or two; got {len(names)}: for instance `hf-rlhf explain grpo@verl grpo@trl`"
        )
    return names, [word for word in words if "=" in word]


def _with_axis(host: Host, name: str) -> tuple[str, str]:
    """Return axis and name of a plugin named alone, or as axis.name. Raise `UserError` with the choices."""
    axis, _, bare = name.partition(".")
    if axis in AXES:
        return axis, bare
    axes = host.axes_of(name)
    if len(axes) == 1:
        return axes[0], name
    if axes:
        raise UserError(f"{name!r} is a plugin of {len(axes)} axes: {' or '.join(f'`show {x} {name}`' for x in axes)}")
    if any(recipe.name == name for recipe in host.recipes()):
        raise UserError(
            f"{name!r} is a recipe: `hf-rlhf recipes show {name}` prints it, `hf-rlhf explain {name}` runs it"
        )
    near = did_you_mean(name, [*AXES, *sorted({offer.name for offer in host.offers() if not offer.problem})])
    raise UserError(f"no axis and no plugin named {name!r}.{near} The axes are: {', '.join(AXES)}")


def _show_plugin(host: Host, axis: str, name: str, as_json: bool) -> None:
    import inspect
    from dataclasses import asdict

    from hf_rlhf.metrics import declared_by

    offer = host.find(axis, name)
    with output_to_stderr(as_json):
        cls = host.get(axis, name)
    doc, module = inspect.getdoc(cls) or "", inspect.getdoc(sys.modules[cls.__module__])
    needs, provides = (_names(cls, attribute) for attribute in ("needs", "provides"))
    settings: list[Setting] = describe(cls)
    metrics = declared_by(cls, axis)
    if as_json:
        said: dict[str, Any] = {"axis": axis, "name": cls.name, "package": offer.package, "version": offer.version}
        said |= {"module": offer.module, "doc": doc, "module_doc": module, "needs": needs, "provides": provides}
        said["metrics"] = {metric: asdict(found) for metric, found in metrics.items()}
        print_json({**said, "settings": [setting._asdict() for setting in settings]})
        return
    print(f"{axis}.{cls.name}, from {offer.source}, {offer.module}\n")
    print(doc + "\n")
    if module:
        print(module + "\n")
    for title in ("meaning", "symptom", "rule"):  # of a pattern
        if hasattr(cls, title):
            print(f"{title}: {getattr(cls, title)}")
    for title, names in (("needs", needs), ("provides", provides)):
        if names:
            print(f"{title}: {names if isinstance(names, str) else ', '.join(names)}")
    if settings:
        table(["setting", "type", "default", "what it does"], [list(setting) for setting in settings])
    else:
        print("It has no settings.")
    if metrics:
        table(["metric", "unit", "what it is"], [[each, found.unit, found.meaning] for each, found in metrics.items()])


def _names(cls: type, attribute: str) -> list[str] | str:
    """Return what a plugin needs or provides, or the property's docstring if that depends on its settings."""
    found: Any = getattr(cls, attribute)
    return " ".join((found.__doc__ or "").split()) if isinstance(found, property) else sorted(found)
