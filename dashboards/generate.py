"""Writes the specification of every shipped recipe's dashboard beside this file; with --check, says which are stale."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.metrics.dashboard import Dashboard, dashboard_of, dashboard_of_stages
from hf_rlhf.metrics.wandb_workspace import specification, workspace_of
from hf_rlhf.registry.host import OWN_PACKAGE, Host, use_host

FOLDER = Path(__file__).parent


def made() -> dict[str, Dashboard]:
    """Recipe -> its dashboard."""
    with use_host(Host(disable="")) as host:
        names = [recipe.name for recipe in host.recipes() if recipe.package == OWN_PACKAGE]
        return {
            name: dashboard_of_stages(load_pipeline(name)) if is_pipeline(name) else dashboard_of(load_recipe(name))
            for name in names
        }


def files() -> dict[str, str]:
    """File name -> what it should hold."""
    return {f"{name}.json": specification(workspace_of(dashboard)) for name, dashboard in made().items()}


def stale(wanted: dict[str, str]) -> list[str]:
    """Files that are missing, too many or other than they should be."""
    there = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.json")}
    return sorted(name for name in wanted.keys() | there if wanted.get(name) != there.get(name))


def main() -> int:
    """The exit status."""
    wanted = files()
    found = stale(wanted)
    if "--check" in sys.argv[1:]:
        if found:
            print(f"stale: {', '.join(found)}; run `python dashboards/generate.py`", file=sys.stderr)
        return int(bool(found))
    for name in found:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
