"""`hf-rlhf env`: the environment, to paste into a bug report. Keys and tokens are only reported as set or not."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections import Counter
from importlib import metadata
from typing import Annotated, Any

import typer

from hf_rlhf._version import __version__
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.commands.show import offered
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json, quieted
from hf_rlhf.registry.discovery import PluginError
from hf_rlhf.registry.host import Host, get_host

PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "trl", "peft", "tokenizers", "safetensors", "huggingface_hub"),
    *(
        "pluggy",
        "pydantic",
        "typer",
        "rich",
        "numpy",
        "pyarrow",
        "wandb",
        "trackio",
        "tensorboard",
        "mlflow-skinny",
        "ray",
        "uvicorn",
    ),
    *("starlette", "deepspeed", "flash-attn", "bitsandbytes", "liger-kernel", "vllm"),
)
"""Distributions whose version matters; those that are not installed are left out."""
PREFIXES = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "WANDB_", "ACCELERATE_", "FSDP_", "TORCH", "PYTORCH_", "CUDA_", "NCCL_"),
    *("OMP_", "MKL_", "TOKENIZERS_", "TQDM_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_"),
)
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "FORCE_COLOR", "COLUMNS")
"""Environment variables that change behaviour, besides those that begin with one of `PREFIXES`."""
SECRET = re.compile(
    r"(^|_)((API|ACCESS)?(TOKEN|KEY)|SECRET|PASS(WORD|WD|PHRASE)?|CREDENTIAL|AUTH)S?(_|$)", re.IGNORECASE
)
"""Words of names whose values are not printed."""
LOGIN = re.compile(r"((?<=://)|(?<!\S))((?!://)\S)*@")
"""User and password: the part before the last @ of a URL, with a scheme or without."""
SANDBOXES: dict[str, dict[str, Any]] = {
    "bubblewrap": {},
    "docker": {},
    "podman": {},
    "rlimits": {"i_understand_this_is_not_a_sandbox": True},
}
"""Sandbox of `unit_tests` that this machine may have -> the settings that it needs."""


@app.command(
    short_help="Print what to paste into a bug report.",
    epilog=examples(
        "hf-rlhf env",
        "hf-rlhf env --json",
        "hf-rlhf env --import    # which plugins of other packages cannot be imported, and why",
    ),
)
def env(
    import_plugins: Annotated[
        bool,
        typer.Option(
            "--import", help="Import every plugin, which runs the code of its package, and name those that fail."
        ),
    ] = False,
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Print versions, devices, W&B, sandboxes and plugins, to paste into a bug report. Keys and tokens are not printed."""
    with output_to_stderr():
        found = environment(get_host(), import_plugins)
    if as_json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))


def environment(host: Host, import_plugins: bool = False) -> dict[str, Any]:
    """Return the output of `hf-rlhf env` as plain data."""
    variables = _variables()  # before libraries set theirs
    return {
        "hf_rlhf": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": _versions(),
        **_devices(),
        "wandb": _wandb(),
        "sandboxes of unit_tests": _sandboxes(),
        "plugins": _plugins(host),
        "plugin faults": _faults(host, import_plugins),
        "environment variables": variables,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _devices() -> dict[str, Any]:
    """Return processor, memory, accelerators and processes of the run."""
    machine: dict[str, Any] = {"cores": _cores()}
    try:
        machine["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):  # not on Windows
        machine["memory"] = "unknown"
    try:
        import torch
    except Exception as error:  # a broken installation is what a report is about
        return {**machine, "torch": f"cannot be imported: {type(error).__name__}: {error}"}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    build = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "cuDNN": cudnn}
    said = ", ".join(f"{name} {version}" for name, version in build.items() if version)
    machine["torch"] = f"{torch.__version__} ({said or 'CPU build'}; {torch.get_num_threads()} threads)"
    machine["devices"] = _accelerators(torch)
    machine["distributed"] = (
        f"process {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']}"
        if "WORLD_SIZE" in os.environ
        else "one process"
    )
    return machine


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _accelerators(torch: Any) -> list[str]:
    """Return name and memory of each accelerator."""
    if torch.cuda.is_available():
        found = []
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            found.append(f"cuda:{number} {facts.name}, {facts.total_memory / 2**30:.1f} GiB")
        return found
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [str(current)] if current is not None else []


def _wandb() -> dict[str, Any]:
    """Return whether W&B is installed and has an account, its mode and its server. The key itself is not read."""
    try:
        import wandb

        from hf_rlhf.runtime.wandb_account import has_account

        try:
            settings = wandb.setup().settings
            server = _without_login(settings.base_url)
            return {"logged in": has_account(settings), "mode": settings.mode, "server": server}
        finally:
            wandb.teardown()
    except Exception as error:
        return {"problem": _without_login(f"{type(error).__name__}: {error}")}


def _sandboxes() -> dict[str, str]:
    """Return sandbox -> `works`, or why it does not. Runs the trial programs that a run uses."""
    from hf_rlhf.config.recipe import load_plugin

    found = {}
    for name, needs in SANDBOXES.items():
        try:
            load_plugin("rewards", "hf_rlhf/unit_tests", column="tests", sandbox=name, **needs).setup(None)
        except Exception as error:
            found[name] = str(error)
        else:
            found[name] = "works" if not needs else "works, and is NO sandbox"
    return found


def _plugins(host: Host) -> dict[str, dict[str, Any]]:
    """Return package -> its version and its number of plugins and recipes."""
    plugins = Counter((offer.package, offer.version) for offer in host.offers() if offer.name)
    recipes = Counter((recipe.package, recipe.version) for recipe in host.recipes())
    return {
        package: {"version": version, "plugins": plugins[package, version], "recipes": recipes[package, version]}
        for package, version in sorted({*plugins, *recipes})
    }


def _faults(host: Host, import_plugins: bool) -> list[str]:
    """Return the plugins and recipes that cannot be used, and why. Imports plugins only on request."""
    said = []
    for offer, problem in offered(host):
        label = f"{offer.axis}.{offer.name} of {offer.source}" if offer.name else offer.source
        if problem:
            said.append(f"{label}: {problem}")
        elif import_plugins:
            try:
                host.get(offer.axis, f"{offer.package}/{offer.name}")
            except PluginError as error:
                said.append(f"{label}: {error}")
    return said + [f"recipe {r.name} of {r.source}: {r.problem}" for r in host.recipes() if r.problem]


def _variables() -> dict[str, str]:
    """Return the variables that change behavior; of secrets only that they are set."""
    chosen = sorted(name for name in {*os.environ} - quieted if name in NAMES or name.startswith(PREFIXES))
    return {name: "(set)" if SECRET.search(name) else _without_login(os.environ[name]) for name in chosen}


def _without_login(text: str) -> str:
    """Remove users and passwords from the URLs in a text."""
    return LOGIN.sub("...@", text)


def _lines(found: dict[str, Any]) -> list[str]:
    """Return plain text: a line for each value, groups below their names."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows = [f"{key}: {_line(inner)}" for key, inner in value.items()]
        elif isinstance(value, list):
            rows = value
        else:
            lines.append(f"{name}: {value}")
            continue
        lines += [f"{name}:" if rows else f"{name}: none", *(f"  {row}" for row in rows)]
    return lines


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{inner} {key}" if key != "version" else str(inner) for key, inner in value.items())
    return " ".join(str(value).split())
