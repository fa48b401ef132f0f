"""docs/commands.md: every command with its options, examples and exit codes, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from hf_rlhf.cli.app import EXIT_CODES, app
from hf_rlhf.cli.flags import FLAGS
from hf_rlhf.cli.main import add_commands

PRECEDENCE = """## What wins

A setting is looked for in five places. A later one wins over an earlier one, wherever it stands on the line:

| place | example |
| --- | --- |
| 1. the default | what `hf-rlhf show AXIS NAME` and [settings.md](settings.md) say |
| 2. the environment | `WANDB_NAME=first` |
| 3. the recipe | `training: {run_name: second}` |
| 4. overrides, in the order in which they are typed | `training.run_name=third` |
| 5. flags, in the order in which they are typed; `--model`, `--dataset`, `--seed` and `--max-steps` last | `--run_name fourth` |

So `hf-rlhf train grpo --temperature 0.7 rollout.temperature=1` samples at 0.7. In `hf-rlhf run`, `--seed` wins over every
`STAGE.training.seed`. `-p` adds to what `HF_RLHF_DISABLE_PLUGINS` turned off and cannot turn it on again; the plugins of a
file named by `-p` are there in any case. `--traceback` wins over `HF_RLHF_TRACEBACK=0`. What has no key in a recipe, such
as `HF_TOKEN` or `WANDB_MODE`, comes from the environment alone."""

OVERRIDES = """## Overrides

`key.sub=value` on the command line, as many as wanted; values are YAML.

| override | what it does |
| --- | --- |
| `kl.0.beta=0.1` | changes a setting; lists count from 0 |
| `advantages.use=leave_one_out` or `advantages=leave_one_out` | another plugin; settings that it shares with the old one stay |
| `advantages={use: gae, lam: 0.9}` | another plugin with these settings alone |
| `rewards.1={use: length, weight: 0.1}` | writing to the place after the last appends |
| `kl=[]` | none |
| `training.learning_rate=1e-6` | the same as `--learning_rate 1e-6` |

Quote for the shell and, within that, for YAML: text with `: `, `{`, `[` or a leading `#` needs quotes of its own, as in
`'rewards.0.answer_after="####"'`. What an override dropped is named in the plan."""

ENVIRONMENT = """## Environment variables

| variable | what it does |
| --- | --- |
| `HF_RLHF_DISABLE_PLUGINS` | a comma list of packages and of `axis.name` that are turned off; `1`: every package but `hf_rlhf` |
| `HF_RLHF_CACHE` | where the quickstart's model and the last traceback are kept; `~/.cache/hf_rlhf` when not set |
| `HF_RLHF_TRACEBACK` | `1` prints tracebacks, as `--traceback` does |
| `WANDB_NAME` | the run's name where recipe and flags have none; of a stage `WANDB_NAME/STAGE` |
| `WANDB_MODE`, `WANDB_PROJECT` and others | as in Weights & Biases; the project is `hf_rlhf` when not set |
| `HF_TOKEN`, `HF_HUB_OFFLINE` and others | as in `huggingface_hub` |
| `NO_COLOR` | no colours in a terminal |
| `HF_HUB_DISABLE_PROGRESS_BARS`, `TQDM_DISABLE` and others | as in their libraries; set where stderr is no terminal |"""

OUTPUT = """## Output

Results go to stdout, warnings and errors to stderr. With `--json`, stdout is one JSON text and nothing else; numbers that are
not finite are `null`. Where stdout is no terminal there are no colours, boxes or progress bars, lines are as long as they are,
and `train` says where it is every ten seconds.

## Errors

What can be mended is one message that begins with `error:`, and the exit code is 2. Anything else ends with the exception, the
place that raised it with the plugin and the package that it belongs to, and the file that holds the last traceback.
`--traceback`, before or after the command, prints tracebacks instead, of errors of the first kind too. A report
needs what `hf-rlhf env` prints; it holds no keys and tokens, and shows paths, host addresses and names of variables."""

COMPLETION = """## Completion in the shell

`hf-rlhf --install-completion` sets it up for bash, zsh, fish or PowerShell, `hf-rlhf --show-completion` prints what it would
set up. Tab then completes commands, flags (every field of TrainingArguments too), recipes, axes, plugins, overrides
(`advantages.use=` and Tab), and stages of `run`; where nothing fits, the shell
offers files. Nothing is imported or run for it: settings of a plugin are read from its source."""


def commands_page(made: str, table: Any) -> Iterator[str]:
    """The page. `table` makes a Markdown table of a header and rows."""
    add_commands()
    found = dict(walk("hf-rlhf", typer.main.get_command(app)))
    yield "# Commands\n\n" + made
    rows = [[link(title), first_sentence(command)] for title, command in found.items() if title != "hf-rlhf"]
    yield table(["command", "what it does"], rows)
    yield PRECEDENCE
    yield OVERRIDES
    yield (
        "## Flags\n\n`train` and `check` take these flags besides their options, with `_` or `-`, as short forms of recipe "
        "keys; TRL's spellings are among them. Every field of TrainingArguments is a flag too. `--use_peft` turns "
        "`model.lora` on.\n\n" + table(["flag", "recipe key"], [[f"`--{k}`", f"`{v}`"] for k, v in FLAGS.items()])
    )
    yield ENVIRONMENT
    yield "## Exit codes\n\n" + table(["code", "meaning"], [[f"`{code}`", meaning] for code, meaning in EXIT_CODES])
    yield OUTPUT
    yield COMPLETION
    for title, command in found.items():
        yield from entry(title, command, table)


def walk(title: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command with its whole name, in the order in which help lists them."""
    yield title, command
    if hasattr(command, "commands"):
        for name in command.list_commands(None):
            yield from walk(f"{title} {name}", command.commands[name])


def entry(title: str, command: Any, table: Any) -> Iterator[str]:
    """A command: how it is written, what it does, its options, its examples."""
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
    """The help of a parameter and its default, where it has one to name."""
    text = " ".join((getattr(parameter, "help", None) or "").split())
    default = parameter.default
    return (
        f"{text} Default `{default}`."
        if isinstance(default, str | int | float) and default not in (False, "")
        else text
    )


def first_sentence(command: Any) -> str:
    return " ".join((command.short_help or command.help or "").split("\n\n")[0].split())


def link(title: str) -> str:
    """A link to the command's heading on the page."""
    return f"[`{title}`](#{title.replace(' ', '-')})"
