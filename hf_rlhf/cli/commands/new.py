"""`hf-rlhf new`: a package with one plugin of an axis, its test, and everything around them. Written from `templates`."""

from __future__ import annotations

import ast
import keyword
import re
import shlex
import subprocess
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from hf_rlhf._version import API_VERSION, __version__
from hf_rlhf.axes import AXES
from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import examples
from hf_rlhf.registry.discovery import spec_of
from hf_rlhf.registry.host import Host, check_axis, get_host
from hf_rlhf.runtime.errors import UserError

TEMPLATES = Path(__file__).parents[1] / "templates"
LONGEST = 30

USE: dict[str, tuple[str, str]] = {
    "rollout": ("quickstart", "rollout={use: my_name, max_new_tokens: 4} rollout_correction.use=truncated"),
    "rewards": ("quickstart", "rewards=[{use: my_name, column: answer}]"),
    "kl": ("quickstart", "kl=[{use: my_name}]"),
    "kl_estimator": ("quickstart", "kl=[{use: in_loss, estimator: my_name}]"),
    "kl_controller": ("quickstart", "kl=[{use: in_reward, controller: my_name}]"),
    "advantages": ("quickstart", "advantages={use: my_name}"),
    "baseline": ("quickstart", "advantages={use: baseline, baseline: my_name}"),
    "critic": ("quickstart", "advantages={use: gae} critic={use: my_name, learning_rate: 0.01}"),
    "policy_loss": ("quickstart", "policy_loss={use: my_name} update.mini_batches=2"),
    "rollout_correction": ("quickstart", "rollout.decode_dtype=bfloat16 rollout_correction={use: my_name}"),
    "reference": ("quickstart", "kl=[{use: in_loss, estimator: k3}] reference={use: my_name}"),
    "optimizer": ("quickstart", "optimizer={use: my_name}"),
    "aggregation": ("quickstart", "aggregation={use: my_name}"),
    "loss_terms": ("quickstart", "loss_terms=[{use: my_name}]"),
    "filters": ("quickstart", "filters=[{use: my_name, resample: 2}]"),
    "trainer": (
        "rm",
        "trainer={use: my_name} model.path=builtin:addition dataset={path: tests/ratings.jsonl, eval_split: null}",
    ),
}
"""Axis -> a recipe that needs no download, and the overrides with which it uses the new plugin."""


@app.command(
    short_help="Write a package with a plugin of your own.",
    epilog=examples(
        "hf-rlhf new                                  # the axes",
        "hf-rlhf new advantages best_of               # writes hf-rlhf-best-of/",
        "hf-rlhf new rewards spelling --path spelling --author 'A. Name'",
    ),
)
def new(
    axis: Annotated[
        str | None,
        typer.Argument(help="What the plugin is; without it the axes are listed.", autocompletion=completion.axes),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="What recipes write after `use:`, such as best_of.")
    ] = None,
    path: Annotated[Path | None, typer.Option("--path", help="The folder to write; hf-rlhf-NAME here.")] = None,
    author: Annotated[str | None, typer.Option("--author", help="Who has the copyright; git's user.name.")] = None,
    taken: Annotated[
        bool, typer.Option("--taken", help="Take a NAME that an installed plugin has: recipes then say package/name.")
    ] = False,
    plugin: PluginOptions = None,
) -> None:
    """Write a package with a plugin of an axis: module, test, pyproject.toml, README, licence and CI. It installs, passes its
    tests and trains as it is; change the plugin into yours."""
    if axis is None or name is None:
        if axis is not None:
            check_axis(axis)
        print("hf-rlhf new AXIS NAME writes a package with a plugin. The axes:\n")
        for each in AXES:
            print(f"  {each:<20}{summary_of(each)}")
        return
    folder = path or Path(distribution_of(name))
    check_axis(axis)
    check_name(get_host(), axis, name, taken)
    files = package(axis, name, author or _git_name() or f"the authors of {distribution_of(name)}")
    write(folder, files)
    print(f"{folder}:\n" + "".join(f"  {file}\n" for file in files))
    recipe, words = USE[axis]
    for line in (
        f"cd {shlex.quote(str(folder))} && pip install -e '.[test]'",
        "pytest",
        f"hf-rlhf train {recipe} {_quoted(words, name)} --max-steps 10",
    ):
        print(line)


def check_name(host: Host, axis: str, name: str, taken: bool) -> None:
    """Raises `UserError` where a plugin or its module cannot have the name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name) or len(name) > LONGEST:
        raise UserError(
            f"{name!r} is no name for a plugin: use lower-case letters, digits and single underscores, {LONGEST} at most, "
            "and no word of Python's, for instance best_of"
        )
    owners = [offer.source for offer in host.offers(axis) if offer.name == name and not offer.problem]
    if owners and not taken:
        raise UserError(
            f"{axis}.{name} is offered by {' and '.join(owners)}: choose another name, or write --taken; recipes then say "
            f"which one, as {distribution_of(name)}/{name}"
        )
    if spec_of(module_of(name)) is not None:
        raise UserError(
            f"a module {module_of(name)} is installed already: choose another name, or uninstall that package"
        )


def package(axis: str, name: str, author: str) -> dict[str, str]:
    """Relative path -> text of every file of a new package."""
    module = _filled((TEMPLATES / f"{axis}.py").read_text(encoding="utf-8"), axis, name)
    recipe, words = USE[axis]
    command = f"{recipe} {_quoted(words, name)}"
    more = {
        "MY_SUMMARY": (ast.get_docstring(ast.parse(module)) or "").partition("\n")[0].replace('"', "'"),
        "MY_COMMAND": f"hf-rlhf train {command}",
        "MY_CHECK": f"hf-rlhf check {command}",
        "MY_RECIPE": _as_yaml(words, name),
        "MY_SETTINGS": _settings_table(module),
        "MY_AUTHOR": author,
        "MY_YEAR": str(date.today().year),
        "MY_VERSION": __version__,
        "MY_API": API_VERSION,
    }

    def text(template: str) -> str:
        return _filled((TEMPLATES / template).read_text(encoding="utf-8"), axis, name, more)

    files = {
        f"{module_of(name)}.py": module,
        f"tests/test_{name}.py": text(f"tests/{axis}.py"),
        "pyproject.toml": text("pyproject.txt"),
        "README.md": text("README.txt"),
        "LICENSE": text("LICENSE.txt"),
        ".github/workflows/test.yml": text("workflow.txt"),
        ".gitignore": text("gitignore.txt"),
    }
    return files | ({"tests/ratings.jsonl": text("ratings.txt")} if axis == "trainer" else {})


def write(folder: Path, files: dict[str, str]) -> None:
    """Writes a package. Raises `UserError` where there is anything in its place."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists, and nothing is overwritten: say where to write with --path")
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def module_of(name: str) -> str:
    """The module of a new plugin."""
    return f"hf_rlhf_{name}"


def distribution_of(name: str) -> str:
    """What pip calls its package."""
    return f"hf-rlhf-{name.replace('_', '-')}"


def class_of(axis: str, name: str) -> str:
    """The name of its class, which nothing else in the module or its test has."""
    found = "".join(part.capitalize() for part in name.split("_"))
    text = "".join((TEMPLATES / folder / f"{axis}.py").read_text(encoding="utf-8") for folder in ("", "tests"))
    return f"{found}Plugin" if re.search(rf"\b{found}\b", text) else found


def summary_of(axis: str) -> str:
    """What the plugins of an axis are, in the first line of its hook."""
    from hf_rlhf.registry import hookspecs

    return (getattr(hookspecs, axis).__doc__ or "").partition("\n")[0]


def _filled(text: str, axis: str, name: str, more: dict[str, str] | None = None) -> str:
    """A template with the names put in; `more` first, as it may hold names too."""
    names = {"my_name": name, "MyName": class_of(axis, name), "my-name": name.replace("_", "-"), "my_axis": axis}
    for word, value in {**(more or {}), **names}.items():
        text = text.replace(word, value)
    return text


def overrides(words: str, name: str) -> list[str]:
    """The overrides of `USE` one by one, with the plugin's name."""
    return [word.strip() for word in re.split(r" (?=[a-z_.]+=)", words.replace("my_name", name))]


def _quoted(words: str, name: str) -> str:
    return " ".join(map(shlex.quote, overrides(words, name)))


def _as_yaml(words: str, name: str) -> str:
    lines = []
    for word in overrides(words, name):
        key, _, value = word.partition("=")
        parts = key.split(".")
        lines.append("".join(f"{part}: {{" for part in parts[:-1]) + f"{parts[-1]}: {value}" + "}" * (len(parts) - 1))
    return "\n".join(lines)


def _settings_table(module: str) -> str:
    """The settings of the class in a module's source, with the text below each."""
    from hf_rlhf.registry.settings_schema import docs_in_source

    found = next(iter(settings for settings in docs_in_source(module).values() if settings), {})
    if not found:
        return ""
    rows = "".join(f"| `{setting}` | {doc} |\n" for setting, doc in found.items())
    return f"| setting | what it does |\n| --- | --- |\n{rows}"


def _git_name() -> str:
    """What git knows its user by; empty where there is none."""
    try:
        done = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
