"""Commands: each with its options and examples; flags and exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from generators.markdown import code, sentence, table
from hf_rlhf.cli.app import EXIT_CODES, app
from hf_rlhf.cli.flags import FLAGS
from hf_rlhf.cli.main import add_commands


def names() -> Iterator[str]:
    """Every command in a line."""
    rows = [
        [f"[`{title}`](#{title.replace(' ', '-')})", sentence(command.short_help or command.help)]
        for title, command in found()
        if " " in title
    ]
    yield table(["command", "what it does"], rows)


def flags() -> Iterator[str]:
    """List the short forms of recipe keys."""
    yield table(["flag", "recipe key"], [[code(f"--{name}"), code(key)] for name, key in FLAGS.items()])


def exit_codes() -> Iterator[str]:
    yield table(["code", "meaning"], [[code(str(number)), meaning] for number, meaning in EXIT_CODES])


def commands() -> Iterator[str]:
    """Every command with its options and examples."""
    for title, command in found():
        yield from entry(title, command)


def found() -> Iterator[tuple[str, Any]]:
    """Every command with its whole name."""
    add_commands()
    return walk("hf-rlhf", typer.main.get_command(app))


def walk(title: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command with its whole name, in the order in which help lists them."""
    yield title, command
    if hasattr(command, "commands"):
        for name in command.list_commands(None):
            yield from walk(f"{title} {name}", command.commands[name])


def entry(title: str, command: Any) -> Iterator[str]:
    """Describe a command: usage, purpose, options and examples."""
    arguments = " ".join(p.metavar or str(p.name).upper() for p in command.params if p.param_type_name == "argument")
    text = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    yield f"## {title}\n\n{text}"
    examples = [line.strip() for line in (command.epilog or "").split("\n\n")[0].splitlines() if line.startswith("  ")]
    yield "```bash\n" + "\n".join(examples) + "\n```"
    if arguments:
        yield f"`{title} {arguments}`"
    named = [parameter for parameter in command.params if "--help" not in parameter.opts]
    rows = [[spelling(parameter), meaning(parameter)] for parameter in named]
    yield table(["argument or option", "what it does"], rows)


def spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or str(parameter.name).upper()}`"
    return ", ".join(f"`{word}`" for word in [*parameter.opts, *parameter.secondary_opts])


def meaning(parameter: Any) -> str:
    """Return the help of a parameter and its default, if it has one."""
    text = " ".join((getattr(parameter, "help", None) or "").split())
    default = parameter.default
    return (
        f"{text} Default `{default}`."
        if isinstance(default, str | int | float) and default not in (False, "")
        else text
    )
