"""The tree and the example packages as wheels, built once for all tests, and an environment without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers.paths import OUTSIDE, ROOT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
TREE = ("hf_rlhf", "plugins", "recipes", "pyproject.toml", "README.md", "LICENSE")
"""What the wheel of hf_rlhf is made from."""
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
"""pip takes what is installed; by its rules the second turns build isolation off."""
NOT_BUILT = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of pytest that its workers share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def built(shared: Path, projects: list[Path]) -> list[Path]:
    """The wheels of these folders with a pyproject.toml, from copies of them; `shared` holds what is built already, also by
    other processes."""
    with FileLock(shared / "wheels.lock"):
        new = [project for project in projects if not (shared / "wheels" / project.name).is_dir()]
        for project in new:
            _copy(project, shared / "sources" / project.name)
            out = shared / "wheels" / project.name
            command = [
                "wheel",
                "--no-deps",
                "--no-build-isolation",
                "-w",
                str(out),
                str(shared / "sources" / project.name),
            ]
            subprocess.run([*PIP, *command], check=True, cwd=shared)
    return [next((shared / "wheels" / project.name).glob("*.whl")) for project in projects]


def _copy(project: Path, to: Path) -> None:
    to.mkdir(parents=True)
    for part in (project / name for name in TREE) if project == ROOT else project.iterdir():
        if part.is_dir() and not part.name.startswith(".") and not part.name.endswith(".egg-info"):
            shutil.copytree(part, to / part.name, ignore=NOT_BUILT)
        elif part.is_file():
            shutil.copy(part, to)


@dataclass
class Environment:
    """A Python environment in a folder, with everything that this one has but hf_rlhf and packages that add to it."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Environment:
        """A new one. Installed packages are links to this environment's, by their names, so that no path leads to the
        checkout, which is installed here in editable form."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        environment = cls(folder)
        (site,) = folder.glob("lib/python*/site-packages")
        linked = folder / "linked"
        linked.mkdir()
        import torch

        for entry in Path(torch.__file__).parents[1].iterdir():
            if not entry.name.startswith(("hf_rlhf", "__editable__", "__pycache__")) and entry.suffix != ".pth":
                (linked / entry.name).symlink_to(entry)
        (site / "linked.pth").write_text(f"{linked}\n")
        for program in ("pip", "pytest"):
            launcher = folder / "bin" / program
            launcher.write_text(f'#!/bin/sh\nexec {folder}/bin/python -P -m {program} "$@"\n')
            launcher.chmod(0o755)
        return environment

    def run(self, *command: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the environment, by the name of its program."""
        program = self.folder / "bin" / command[0]
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**OUTSIDE, **OFFLINE, "PATH": path, "VIRTUAL_ENV": str(self.folder)}
        words = [str(program) if program.exists() else command[0], *command[1:]]
        done = subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True)
        if check:
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def install(self, *wheels: Path) -> None:
        """Wheels, whose dependencies must be there already."""
        pip = [*PIP, "--python", str(self.folder / "bin" / "python"), "install", "--no-index"]
        subprocess.run([*pip, *map(str, wheels)], check=True)
