"""Write a dashboard as a workspace of Weights & Biases, with the library wandb-workspaces (Public Preview).

Documented there: `Workspace`, `Section`, the panels and `Workspace.save`. Undocumented but used here: `_to_model` and
`_from_model` between a workspace and its stored form, and the ids of panels, run sets and views.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from hf_rlhf.metrics.dashboard import Dashboard, Panel, Section
from hf_rlhf.metrics.names import STEP
from hf_rlhf.runtime.errors import UserError

INSTALL = "pip install 'hf_rlhf[dashboard]'"
SMOOTHING = 0.6
"""Weight of the time-weighted moving average over points that are noisy from step to step."""
LAYOUT = {"x": 0, "y": 0, "w": 8, "h": 6}
"""The library's default, which sections override."""
OMITTED = ("flowConfig", "localPanelSettings", "type", "sorted", "pinned")
"""Fields of sections that are left out if they have the library's defaults."""
COLUMNS = (
    *("run:displayName", "run:state", "config:recipe", "config:advantages", "config:policy_loss", "config:kl"),
    *("config:rewards", "summary:train/reward/total/mean", "summary:eval/accuracy"),
)
"""Columns of the table of runs."""


def workspace_of(dashboard: Dashboard, entity: str = "", project: str = "") -> Any:
    """Return the `Workspace` of a dashboard, without network access. Equal dashboards give equal ids."""
    ws, wr = libraries()
    sections = [
        ws.Section(
            name=section.name,
            is_open=section.is_open,
            panels=list(_panels(wr, section)),
            layout_settings=ws.SectionLayoutSettings(columns=1, rows=1)
            if section.table
            else ws.SectionLayoutSettings(),
        )
        for section in dashboard.sections
    ]
    found = ws.Workspace(
        entity=entity,
        project=project,
        name=dashboard.name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(pinned_columns=_columns(dashboard)),
    )
    found._internal_runset_id = _id(dashboard.name)
    return found


def _columns(dashboard: Dashboard) -> list[str]:
    """Return the columns of the table of runs: metrics that no panel shows are left out."""
    return [x for x in COLUMNS if not x.startswith("summary:") or x.removeprefix("summary:") in dashboard.metrics]


def specification(workspace: Any) -> str:
    """Return a workspace's stored form as readable JSON: one line per panel, without the library's defaults."""
    from wandb_workspaces.workspaces.internal import PanelBankConfigSectionsItem

    view = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    usual = PanelBankConfigSectionsItem.model_validate({}).model_dump(mode="json", by_alias=True, exclude_none=True)
    lines: list[str] = []
    for section in view["spec"]["section"]["panelBankConfig"]["sections"]:
        for key in [key for key, value in section.items() if key in OMITTED and value == usual.get(key)]:
            del section[key]
        for place, panel in enumerate(section["panels"]):
            if panel.get("layout") == LAYOUT:
                del panel["layout"]
            lines.append(json.dumps(panel))
            section["panels"][place] = f"panel {len(lines) - 1}"
    text = json.dumps(view, indent=1) + "\n"
    return re.sub(r'"panel (\d+)"', lambda match: lines[int(match[1])], text)


def read_specification(text: str) -> Any:
    """Return the `Workspace` of a specification. Raises `UserError` if it is not valid."""
    ws, _ = libraries()
    from wandb_workspaces.workspaces.internal import View

    try:
        return ws.Workspace._from_model(View.model_validate_json(text))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"this is not a dashboard specification: {str(error).splitlines()[0]}") from error


def push(workspace: Any) -> str:
    """Save a workspace as a new view of its project and return its URL. Raises `UserError` with the server's answer."""
    try:
        workspace.save()
        return str(workspace.url)
    except Exception as error:
        raise UserError(
            f"Weights & Biases rejected the dashboard for {workspace.entity}/{workspace.project}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error


def libraries() -> tuple[Any, Any]:
    """Return `wandb_workspaces.workspaces` and `wandb_workspaces.reports.v2`. Raises `UserError` if not installed."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise UserError(f"a dashboard needs the library {error.name}: {INSTALL}") from error
    return ws, wr


def has_account() -> bool:
    """Return whether Weights & Biases can be asked: there is a key, and it is neither disabled nor offline."""
    import wandb

    from hf_rlhf.runtime.wandb_account import has_account as found

    settings = wandb.setup().settings
    return settings.mode not in ("offline", "disabled", "dryrun") and found(settings)


def owner(entity: str | None) -> str:
    """Return the user or team: `entity`, WANDB_ENTITY, or the account's own. Raises `UserError` if there is none."""
    if named := entity or os.environ.get("WANDB_ENTITY"):
        return named
    import wandb

    try:
        found = wandb.Api().default_entity
    except Exception as error:
        raise UserError(
            f"cannot read the account's owner from Weights & Biases: {error}. Pass --entity NAME"
        ) from error
    if not found:
        raise UserError("a dashboard needs an owner: pass --entity NAME, a user or team of Weights & Biases")
    return str(found)


def _panels(wr: Any, section: Section) -> Iterator[Any]:
    for panel in section.panels:
        yield _with_id(_line_plot(wr, panel), section.name, panel.title)
    if section.table is not None:
        yield _with_id(wr.WeavePanelSummaryTable(table_name=section.table), section.name, section.table)


def _line_plot(wr: Any, panel: Panel) -> Any:
    smoothing = {"smoothing_type": "none"}
    if panel.smoothed:
        smoothing = {
            "smoothing_type": "exponentialTimeWeighted",
            "smoothing_factor": SMOOTHING,  # type: ignore[dict-item]
            "smoothing_show_original": True,  # type: ignore[dict-item]
        }
    return wr.LinePlot(
        title=panel.title,
        x=STEP,
        y=list(panel.metrics),
        title_x="optimizer steps",
        title_y=panel.unit or None,
        range_y=panel.axis,
        plot_type="stacked-area" if panel.stacked else "line",
        custom_expressions=list(_expressions(panel)) or None,
        **smoothing,
    )


def _expressions(panel: Panel) -> Iterator[str]:
    """Yield reference lines, which the library lacks: the metric times 0 plus the bound.

    Expressions replace metrics, which are therefore written as expressions too.
    """
    if panel.lines:
        yield from (f"${{{name}}}" for name in panel.metrics)
        yield from (f"${{{panel.metrics[0]}}} * 0 + {line:g}" for line in panel.lines)


def _with_id(panel: Any, *words: str) -> Any:
    panel._id = _id(*words)
    return panel


def _id(*words: str) -> str:
    """Return eleven letters and digits, in the library's format."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:11]
