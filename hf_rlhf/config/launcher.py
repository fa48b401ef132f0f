"""The launcher of this process, and how many processes it was asked for."""

from __future__ import annotations

import os
from pathlib import Path

STARTED = "ACCELERATE_MIXED_PRECISION"
"""Variable that `accelerate launch` sets for every process."""
COUNT = ("--num_processes", "--num-processes")


def lone_process(processes: int) -> list[str]:
    """Return a remark where `accelerate launch` was asked for several processes and started one, as it does on a CPU."""
    if processes > 1 or STARTED not in os.environ:
        return []
    import psutil

    try:
        asked = asked_for(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return []
    if asked < 2:
        return []
    return [
        f"accelerate launch was asked for {asked} processes and started this one alone, as it does on a CPU. Use the flag "
        f"--nproc {asked} instead, or `torchrun --nproc-per-node {asked} SCRIPT`"
    ]


def asked_for(words: list[str]) -> int:
    """Return the number of processes that the command line of `accelerate launch` asks for, or else its configuration."""
    from accelerate.commands.config import default_config_file, load_config_from_file

    if not any("accelerate" in word for word in words):
        return 1  # the launcher started what started this process
    options = {name: value or after for name, value, after in map(_split, words, [*words[1:], ""])}
    for name in COUNT:
        if options.get(name, "").isdecimal():
            return int(options[name])
    file = options.get("--config_file") or options.get("--config-file") or default_config_file
    return int(load_config_from_file(file).num_processes or 1) if Path(file).is_file() else 1


def _split(word: str, after: str) -> tuple[str, str, str]:
    name, _, value = word.partition("=")
    return name, value, after
