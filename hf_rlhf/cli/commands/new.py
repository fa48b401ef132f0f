"""`hf-rlhf new`: write a package around the example plugin of an axis."""

from __future__ import annotations

import ast
import keyword
import re
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from hf_rlhf._version import __version__
from hf_rlhf.axes import AXES
from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import examples
from hf_rlhf.config.recipe_yaml import OFFLINE
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.discovery import spec_of
from hf_rlhf.registry.host import Host, check_axis, get_host
from hf_rlhf.runtime.errors import UserError

TEMPLATES = Path(__file__).parents[1] / "templates"
LONGEST = 30
"""Maximum length of a plugin's name."""
TRY = re.compile(r"^Try it: `hf-rlhf train (.+)`$", re.MULTILINE)
"""Command in the docstring of each example."""
PROJECT = 'readme = "README.md"\nlicense = "MIT"\nlicense-files = ["LICENSE"]\n'
"""Lines of pyproject.toml that `--full` adds to the project table."""


@app.command(
    short_help="Write a package with a plugin of your own.",
    epilog=examples(
        "hf-rlhf new                                  # list the axes",
        "hf-rlhf new advantages best_of               # write hf-rlhf-best-of/: module, test, pyproject.toml",
        "hf-rlhf new rewards spelling --full --path spelling --author 'A. Name'",
    ),
)
def new(
    axis: Annotated[
        str | None,
        typer.Argument(help="Axis of the plugin; left out, the axes are listed.", autocompletion=completion.axes),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name that recipes write after `use:`, such as best_of.")
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Add every optional method, a README, a licence, lint settings and a CI workflow."),
    ] = False,
    path: Annotated[
        Path | None, typer.Option("--path", help="Folder to write; hf-rlhf-NAME in this folder by default.")
    ] = None,
    author: Annotated[
        str | None, typer.Option("--author", help="Copyright holder for --full; git's user.name by default.")
    ] = None,
    taken: Annotated[
        bool, typer.Option("--taken", help="Allow a NAME that an installed plugin has: recipes then say package/name.")
    ] = False,
    plugin: PluginOptions = None,
) -> None:
    """Write a package with a plugin of an axis: the axis' example under your name, and its conformance test. It installs,
    passes its test and trains as it is; change the plugin into yours."""
    if axis is None or name is None:
        if axis is not None:
            check_axis(axis)
        print("hf-rlhf new AXIS NAME writes a package with a plugin. The axes:\n")
        for each in AXES:
            print(f"  {each:<20}{hookspecs.summary(each)}")
        return
    folder = path or Path(distribution_of(name))
    check_axis(axis)
    check_name(get_host(), axis, name, taken)
    owner = (author or _git_name() or f"the authors of {distribution_of(name)}") if full else None
    files = package(axis, name, owner)
    write(folder, files)
    print(f"{folder}:\n" + "".join(f"  {file}\n" for file in files))
    for line in (
        f"cd {shlex.quote(str(folder))} && pip install -e '.[test]'",
        "pytest",
        f"hf-rlhf train {shlex.join(command_of(files[f'{module_of(name)}.py']))} --max-steps 10",
    ):
        print(line)


def check_name(host: Host, axis: str, name: str, taken: bool) -> None:
    """Raise `UserError` if a plugin or its module cannot have the name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name) or len(name) > LONGEST:
        raise UserError(
            f"invalid plugin name {name!r}: use lower-case letters, digits and single underscores, {LONGEST} characters at "
            "most, and no Python keyword, for instance best_of"
        )
    owners = [offer.source for offer in host.offers(axis) if offer.name == name and not offer.problem]
    if owners and not taken:
        raise UserError(
            f"{axis}.{name} is already offered by {' and '.join(owners)}. Choose another name, or pass --taken and write "
            f"{distribution_of(name)}/{name} in recipes"
        )
    if spec_of(module_of(name)) is not None:
        raise UserError(
            f"a module {module_of(name)} is already installed. Choose another name, or uninstall that package"
        )


def package(axis: str, name: str, author: str | None = None) -> dict[str, str]:
    """Return the text of every file of a new package by its relative path; with an author, all that `--full` writes."""
    module = module_for(axis, name)
    summary = (ast.get_docstring(ast.parse(module)) or "").partition("\n")[0].replace('"', "'")
    more = {
        "MY_SUMMARY": summary,
        "MY_VERSION": __version__,
        "MY_PROJECT": PROJECT if author else "",
    }
    files = {
        f"{module_of(name)}.py": module,
        f"tests/test_{name}.py": _filled("test.txt", axis, name, more),
        "pyproject.toml": _filled("pyproject.txt", axis, name, more),
    }
    if author is None:
        return files
    recipe, *overrides = command_of(module)
    command = shlex.join([recipe, *overrides])
    more |= {
        "MY_COMMAND": f"hf-rlhf train {command}",
        "MY_CHECK": f"hf-rlhf check {command}",
        "MY_RECIPE": _as_yaml(overrides),
        "MY_SETTINGS": _settings_table(module),
        "MY_AUTHOR": author,
        "MY_YEAR": str(date.today().year),
    }
    if not AXES[axis].axis.watches:  # `find` is all that is called of a pattern
        template = "everything_offline.py" if axis == OFFLINE else "everything.py"
        files[f"{module_of(name)}.py"] = with_everything(module, template)
    rest = {
        "README.md": "README.txt",
        "LICENSE": "LICENSE.txt",
        ".github/workflows/test.yml": "workflow.txt",
        ".gitignore": "gitignore.txt",
    }
    return files | {file: _filled(template, axis, name, more) for file, template in rest.items()}


def module_for(axis: str, name: str) -> str:
    """Return the example of an axis with the plugin's and the class' name replaced."""
    source = hookspecs.example(axis)
    node, old = plugin_class(source)
    wanted = "".join(part.capitalize() for part in name.split("_"))
    others = re.sub(rf"\b{node.name}\b", "", source)
    others += "".join(file.read_text(encoding="utf-8") for file in TEMPLATES.glob("everything*.py"))
    own = f"{wanted}Plugin" if re.search(rf"\b{wanted}\b", others) else wanted
    source = re.sub(rf"\b{node.name}\b", own, source).replace(f'name = "{old}"', f'name = "{name}"')
    return TRY.sub(lambda found: re.sub(rf"\b{old}\b", name, found[0]), source)


def plugin_class(source: str) -> tuple[ast.ClassDef, str]:
    """Return the plugin class in a module's source, and its `name`."""
    for node in ast.parse(source).body:
        for line in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "name":
                return node, ast.literal_eval(line.value)  # type: ignore[return-value]
    raise ValueError("no class with a name")


def command_of(source: str) -> list[str]:
    """Return recipe and overrides of the command in a module's docstring."""
    found = TRY.search(source)
    return shlex.split(found[1]) if found else []


def with_everything(source: str, template: str) -> str:
    """Return a module whose plugin class also has the members of a template's class, with their imports."""
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    node, _ = plugin_class(source)
    (more,) = (each for each in ast.parse(text).body if isinstance(each, ast.ClassDef))
    own = {getattr(each, "name", "") for each in node.body}
    lines, extra = source.splitlines(), text.splitlines()
    first = next(each for each in node.body if isinstance(each, ast.FunctionDef))
    start = min([first.lineno, *(each.lineno for each in first.decorator_list)]) - 1
    end = node.end_lineno or len(lines)
    for each in reversed([each for each in more.body if isinstance(each, ast.FunctionDef) and each.name not in own]):
        text_of = extra[each.lineno - 1 : each.end_lineno]
        if each.name == "__post_init__":
            lines[start:start] = [*text_of, ""]
        else:
            lines[end:end] = ["", *text_of]
    (metrics,) = (each for each in more.body if isinstance(each, ast.Assign))
    _add_metrics(lines, node, extra[metrics.lineno - 1 : metrics.end_lineno])
    return _with_imports("\n".join(lines) + "\n", text)


def _add_metrics(lines: list[str], node: ast.ClassDef, metrics: list[str]) -> None:
    """Insert `metrics = (...)` below the class attributes of a class, or add them to its own."""
    plain = [each for each in node.body if isinstance(each, ast.Assign)]
    own = next((each for each in plain if ast.unparse(each.targets[0]) == "metrics"), None)
    end = (own or plain[-1]).end_lineno or 0
    lines[end - 1 if own else end : end - 1 if own else end] = metrics[1:-1] if own else metrics


def _with_imports(source: str, other: str) -> str:
    """Return `source` with those imports of `other` that it uses, sorted as isort does."""
    names: dict[str, set[str]] = {}
    plain: set[str] = set()
    body = [node for text in (source, other) for node in ast.parse(text).body]
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names.setdefault(node.module or "", set()).update({alias.name for alias in node.names} & used)
        elif isinstance(node, ast.Import):
            plain |= {alias.name for alias in node.names}
    lines = {f"import {name}": name for name in sorted(plain)}
    for module, found in sorted(names.items()):
        if found:
            ordered = sorted(found, key=lambda name: (not name.isupper(), name[0].islower(), name.lower()))
            lines[f"from {module} import {', '.join(ordered)}"] = module
    standard = [line for line, name in lines.items() if name.partition(".")[0] in sys.stdlib_module_names]
    others = [line for line in lines if line not in standard]
    head, _, rest = source.partition("from __future__ import annotations\n")
    _, _, rest = rest.partition("\nhf_rlhf_api")
    blocks = ["from __future__ import annotations", "\n".join(standard), "\n".join(others)]
    return head + "\n\n".join(blocks) + "\n\nhf_rlhf_api" + rest


def write(folder: Path, files: dict[str, str]) -> None:
    """Write a package. Raises `UserError` if there is anything in its place."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists, and nothing is overwritten. Pass --path to write elsewhere")
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def module_of(name: str) -> str:
    """Return the module of a new plugin."""
    return f"hf_rlhf_{name}"


def distribution_of(name: str) -> str:
    """Return the name of its package for pip."""
    return f"hf-rlhf-{name.replace('_', '-')}"


def _filled(template: str, axis: str, name: str, more: dict[str, str]) -> str:
    """Return a template with the names put in; `more` first, as it may hold names too."""
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    names = {"my_name": name, "my-name": name.replace("_", "-"), "my_axis": axis}
    for word, value in {**more, **names}.items():
        text = text.replace(word, value)
    return text


def _as_yaml(overrides: list[str]) -> str:
    lines = []
    for word in overrides:
        key, _, value = word.partition("=")
        parts = key.split(".")
        lines.append("".join(f"{part}: {{" for part in parts[:-1]) + f"{parts[-1]}: {value}" + "}" * (len(parts) - 1))
    return "\n".join(lines)


def _settings_table(module: str) -> str:
    """Return a table of the settings of the class in a module's source."""
    from hf_rlhf.registry.settings_schema import docs_in_source

    found = next(iter(settings for settings in docs_in_source(module).values() if settings), {})
    if not found:
        return ""
    rows = "".join(f"| `{setting}` | {doc} |\n" for setting, doc in found.items())
    return f"| setting | what it does |\n| --- | --- |\n{rows}"


def _git_name() -> str:
    """Return git's user.name, empty if there is none."""
    try:
        done = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
