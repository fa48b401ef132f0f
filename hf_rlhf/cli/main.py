"""Entry point of the command line."""

from __future__ import annotations

import atexit
import os
import sys

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import app
from hf_rlhf.cli.errors import ASKED, report
from hf_rlhf.cli.output import quiet_off_terminal
from hf_rlhf.runtime.plain_text import clean_all_logs


def add_commands() -> None:
    """Import the modules of `commands`, which register themselves with `app`."""
    from hf_rlhf.cli.commands import (  # noqa: F401
        chat,
        dashboard,
        doctor,
        env,
        evaluate,
        import_trl,
        lab,
        new,
        pipeline,
        plan,
        play,
        plugins_check,
        report,
        rewards,
        schema,
        serve_engine,
        show,
        train,
    )


def main() -> None:
    """Run the command line. Errors are one message on stderr with an exit code of `EXIT_CODES`; tracebacks are on request."""
    quiet_off_terminal()
    clean_all_logs()
    if "--traceback" in sys.argv[1:]:  # before or after the command
        sys.argv.remove("--traceback")
        os.environ[ASKED] = "1"
    try:
        try:
            add_commands()
            completion.run(app)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _end(1)
    except KeyboardInterrupt:
        _end(130)
    except Exception as error:
        _end(report(error))


def _end(code: int) -> None:
    if "RANK" in os.environ:  # threads of a process group may hang or abort the interpreter's exit
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
