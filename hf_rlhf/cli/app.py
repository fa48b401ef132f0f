"""The Typer app and its options. Commands that only list import neither torch nor a plugin.

Modules of commands import `app` (or a group) and decorate with it; `add_commands` imports these modules.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_rlhf._version import __version__
from hf_rlhf.cli import completion
from hf_rlhf.cli.errors import ASKED
from hf_rlhf.cli.output import examples, output_to_stderr
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.errors import UserError, did_you_mean

EXIT_CODES = (
    (0, "done"),
    (1, "failed: an unexpected error, a reward that failed, or, in `score`, a row that could not be scored"),
    (2, "rejected before running: the message says how to fix it"),
    (3, "`doctor` found something wrong with a run"),
    (129, "hung up (SIGHUP); training saves a checkpoint first"),
    (130, "interrupted (Ctrl-C, SIGINT); training saves a checkpoint first"),
    (143, "terminated (SIGTERM); training saves a checkpoint first"),
)
"""Exit code and its meaning. Other signals give 128 + their number."""

FIRST = (
    "train",
    "check",
    "plan",
    "evaluate",
    "chat",
    "play",
    "pipeline",
    "recipes",
    "plugins",
    "show",
    "explain",
    "lab",
    "report",
    "doctor",
    "score",
    "serve-reward",
    "serve-engine",
)
"""Commands that help lists first, in this order."""


class Ordered(TyperGroup):
    """List commands in the order of `FIRST`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        order = {name: place for place, name in enumerate(FIRST)}
        return sorted(super().list_commands(ctx), key=lambda name: order.get(name, len(order)))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; raise `UserError` with the nearest names if there is none."""
        if args[0] in self.commands or args[0].startswith("-"):
            return super().resolve_command(ctx, args)
        near, names = did_you_mean(args[0], self.commands), ", ".join(self.list_commands(ctx))
        raise UserError(f"no command {args[0]!r}.{near} The commands are: {names}")


app = typer.Typer(
    cls=Ordered,
    help="Reinforcement learning on language models: recipes of interchangeable plugins.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=examples(
        "hf-rlhf train quickstart --max-steps 20    # the embedded task: no download, no GPU",
        "hf-rlhf recipes                            # the algorithms",
        "hf-rlhf check grpo kl.0.beta=0.1           # what a change would do",
        "hf-rlhf show advantages group_norm         # one plugin and its settings",
        "hf-rlhf env                                # what to paste into a bug report",
    )
    + "\n\n\b\nExit codes:\n"
    + "\n".join(f"{number:>5}  {meaning}" for number, meaning in EXIT_CODES),
)
recipes_app = typer.Typer(
    cls=Ordered,
    help="List the recipes that are installed, or show one.",
    invoke_without_command=True,
    rich_markup_mode=None,
    epilog=examples("hf-rlhf recipes", "hf-rlhf recipes --json", "hf-rlhf recipes show grpo > mine.yaml"),
)
app.add_typer(recipes_app, name="recipes")
plugins_app = typer.Typer(
    cls=Ordered,
    help="List the plugins that are installed, without importing them.",
    invoke_without_command=True,
    rich_markup_mode=None,
    epilog=examples(
        "hf-rlhf plugins",
        "hf-rlhf plugins --json",
        "hf-rlhf plugins -p no:rewards.judge    # as if it were not installed",
    ),
)
"""The group `plugins`: add a command with `@plugins_app.command()`."""
app.add_typer(plugins_app, name="plugins")


def _configure(context: typer.Context, values: list[str] | None) -> list[str] | None:
    if not context.resilient_parsing:  # completing a line must not run a file
        with output_to_stderr(bool(values)):
            get_host().configure(values or ())
    return values


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hf_rlhf {__version__}")
        raise typer.Exit


def _traceback(wanted: bool) -> None:
    if wanted:
        os.environ[ASKED] = "1"


PluginOptions = Annotated[
    list[str] | None,
    typer.Option(
        "-p",
        "--plugin",
        metavar="FILE.py|no:NAME",
        callback=_configure,
        autocompletion=completion.plugin_option,
        help="Add the plugins of a file, or turn off a package (no:PACKAGE) or a plugin (no:axis.name). Repeatable.",
    ),
]
"""The option `-p`, accepted before and after a command's name."""


@app.callback()
def options(
    plugin: PluginOptions = None,
    traceback: Annotated[
        bool,
        typer.Option("--traceback", callback=_traceback, help=f"Print tracebacks of errors, as does {ASKED}=1."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Set the options of every command."""
