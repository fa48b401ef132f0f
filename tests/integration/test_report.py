"""report.html of real runs, looked at in Chromium: no console error, no request, whatever the run holds."""

from __future__ import annotations

import base64
import json
import logging
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from hf_rlhf import report
from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.metrics.console import number
from hf_rlhf.metrics.row_file import RowFile
from hf_rlhf.report import curves
from hf_rlhf.report.build import FILE, MOST_BYTES, write_report
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.run_folder import remove_run
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.recording import quantized
from tests.helpers import offline_runs as off
from tests.helpers.browser import Page, browser

SMALL = ["rollout.prompts=8", "rollout.num_generations=4", "rollout.max_new_tokens=5", "evaluation.prompts=8"]
TRAINING = ["training.max_steps=4", "training.use_cpu=true"]


READY = """new Promise((done) => {
  const asked = setInterval(() => { if ("complete" in document.documentElement.dataset) { clearInterval(asked); done(); } }, 10);
})"""
"""Resolves once the page has read its data."""


def opened(tab: Page, page: Path) -> None:
    tab.open(page)
    tab.evaluate(READY)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_policy():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(load_recipe("quickstart", [f"model.path={model}", *SMALL, *TRAINING]), str(folder))
    return folder


def test_a_run_ends_with_a_page_that_requests_nothing_and_raises_nothing(run):
    with browser() as tab:
        opened(tab, run / FILE)
        assert tab.evaluate("document.querySelector('h1').textContent") == "first"
        assert tab.evaluate("document.querySelectorAll('.panel canvas').length") >= 5
        tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
        tab.evaluate("new Promise((done) => setTimeout(done, 200))")
        assert tab.evaluate("document.querySelectorAll('.panel canvas').length") >= 40
        for width in (1400, 400):
            tab.view(width)
            assert tab.overflow() == 0
        assert (tab.errors, tab.requests) == ([], [])


def test_a_run_without_rollouts_ends_with_a_page_too(tmp_path):
    train(off.recipe(tmp_path, "reward_model", "training.max_steps=2"), str(tmp_path / "run"))
    with browser() as tab:
        opened(tab, tmp_path / "run" / FILE)
        assert tab.evaluate("document.querySelectorAll('.panel canvas').length") >= 2
        assert (tab.errors, tab.requests) == ([], [])


def test_a_report_that_fails_is_a_warning(run, model, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr("hf_rlhf.report.build.html_of", lambda runs: 1 / 0)
    with caplog.at_level(logging.WARNING):
        train(load_recipe("quickstart", [f"model.path={model}", *SMALL, *TRAINING]), str(tmp_path / "run"))
    assert [x for x in caplog.messages if "report.html was not written" in x and "ZeroDivisionError" in x]
    assert (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run").glob("report*"))


def test_a_run_that_is_replaced_leaves_no_report_of_the_old_one(tmp_path):
    (tmp_path / FILE).write_text("old")
    remove_run(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_folder_without_a_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"RUN must be a folder with a run, got .*empty"):
        write_report([tmp_path / "empty"])
    with pytest.raises(UserError, match=rf"Name its runs: {run}"):
        write_report([run.parent])


# Text from outside


HOSTILE = [
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'>",
    "<!--<script>",
    "]]></style><style>* { display: none }</style>",
    "'\"&amp;&lt; ${window.broken = 3} {{7*7}}",
    "javascript:window.broken=4",
    "nul \x00 escape \x1b[31m bell \x07 return \r\n tab \t",
    "half a pair \ud83e and \udd99",
    "turned \u202e around \u2066 and \u2028 lines \u2029",
    "",
    "🦙" * 300 + "x" * 3000,
]


def hostile_run(folder: Path) -> Path:
    """The files of a run in which every text is hostile."""
    rows = [
        {
            "pieces": [text, *text[:50]],
            "finish": text,
            "rewards": {text: 0.5},
            "total": 0.5,
            "dropped": None if i % 2 else text,
            **dict.fromkeys(
                ("advantage", "kl", "logp"), quantized([(-1.0) ** k * k for k in range(1 + len(text[:50]))])
            ),
        }
        for i, text in enumerate(HOSTILE)
    ]
    groups = [{"prompt": text, "reference": text, "rows": rows[:3]} for text in HOSTILE]
    messages = [{"role": text, "content": text, "tool_calls": [{"name": text}]} for text in HOSTILE]
    groups.append({"prompt": messages, "reference": None, "rows": rows})
    for name in ("rollouts", "evaluation"):
        (folder / name).mkdir(parents=True)
    (folder / "rollouts" / "step_000001.json").write_text(json.dumps({"step": 0, "groups": groups}))
    held_out = [dict.fromkeys(("prompt", "completion", "reference"), text) | {"reward": 1.0} for text in HOSTILE]
    for step in (0, 2):
        with RowFile(
            folder / "evaluation" / f"step_{step:06d}.parquet", {**dict.fromkeys(held_out[0], str), "reward": float}
        ) as file:
            file.add(held_out)
    entries = [{"step": step, "loss": 1.0 / step, **{text: float(step) for text in HOSTILE}} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (folder / "recipe.yaml").write_text("x: " + json.dumps(HOSTILE[:7]))
    named = dict(zip(("recipe", "model", "dataset"), HOSTILE, strict=False))
    lists = dict.fromkeys(("models", "forwards", "skipped", "remarks", "memory_notes"), HOSTILE)
    plan = {
        **lists,
        "arithmetic": [HOSTILE[:3]],
        "plugins": [dict.fromkeys(("axis", "name", "package", "version"), HOSTILE[0])],
    }
    findings = [
        {"pattern": "no_spread", "step": 1, "text": text, "overrides": [text], "metric": text} for text in HOSTILE
    ]
    held = dict.fromkeys(HOSTILE, 0.5)
    summary = {**named, "steps": 2, "before": held, "after": held, "plan": plan, "versions": held, "findings": findings}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "<b onclick=alert(1)>&'"
    return write_report([hostile_run(folder)])


def test_nothing_that_a_run_holds_is_markup_or_runs(hostile):
    page = hostile.read_text("utf-8")
    assert page.count("<script") == page.count("</script") == 3 + UPLOT.count("<script")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff\u2028-\u202e\u2066-\u2069]", page)
    with browser() as tab:
        opened(tab, hostile)
        tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
        for heat in ("KL to the reference", "log-prob", "none"):
            tab.evaluate(PRESS % json.dumps(heat))
        assert tab.evaluate("window.broken === undefined")
        assert (
            tab.evaluate(
                "document.querySelectorAll('main img, main script, main style, main a, main b[onclick]').length"
            )
            == 0
        )
        assert tab.evaluate(
            "[...document.querySelectorAll('*')].every((x) => ![...x.attributes].some((a) => a.name.startsWith('on')))"
        )
        assert tab.evaluate("document.querySelector('#rollouts').textContent.includes('<img src=x onerror=')")
        for width in (1400, 400):
            tab.view(width)
            assert tab.overflow() == 0
        assert (tab.errors, tab.requests) == ([], [])


PRESS = "[...document.querySelectorAll('button')].find((button) => button.textContent === %s).click()"
UPLOT = (Path(report.__file__).parent / "static" / "uplot.js").read_text()


def test_a_script_that_got_in_would_not_run(hostile, tmp_path):
    page = hostile.read_text("utf-8").replace(
        "<main>", "<main><script>window.broken = 1</script><img src='http://127.0.0.1:9/x'>"
    )
    (tmp_path / "page.html").write_text(page)
    with browser() as tab:
        opened(tab, tmp_path / "page.html")
        assert tab.evaluate("window.broken === undefined")
        assert any("Content Security Policy" in error for error in tab.errors)


# What it shows


def test_a_conversation_is_shown_whole_and_what_the_environment_said_has_no_number(model, tmp_path):
    says = "environment=[{use: second_chance, max_tokens: 40, says: 'no {prompt}'}]"
    own = [says, "rewards=[episode]", *SMALL, *TRAINING]
    train(load_recipe("quickstart", [f"model.path={model}", *own]), str(tmp_path / "run"))
    with browser() as tab:
        opened(tab, tmp_path / "run" / FILE)
        rows = tab.evaluate(ROWS_WITH_TURNS)
        assert rows
        for prompt, said, titles in rows:
            assert said == f"no {prompt}"
            assert titles == 0
        assert (tab.errors, tab.requests) == ([], [])


ROWS_WITH_TURNS = """[...document.querySelectorAll('#rollouts .group')].flatMap((group) =>
  [...group.querySelectorAll('.row')].filter((row) => row.querySelector('.tool')).map((row) => {
    const said = [...row.querySelectorAll('.tool')];
    const text = said.map((x) => x.textContent).join('');
    return [group.querySelector('.prompt').textContent, text, said.filter((x) => x.title).length];
  }))"""
"""[prompt, what has mask 0, how many of its tokens have a number] of each row of several turns."""


def test_tokens_are_colored_by_the_number_that_is_chosen(run):
    with browser() as tab:
        opened(tab, run / FILE)
        colors = "[...new Set([...document.querySelectorAll('.tokens span')].map((x) => x.style.background))]"
        assert tab.evaluate("document.querySelectorAll('.group').length") == 4
        assert tab.evaluate("document.querySelectorAll('.row').length") == 16
        tab.evaluate(PRESS % json.dumps("log-prob"))
        assert len(tab.evaluate(colors)) > 8
        sample = json.loads((run / "rollouts" / "step_000004.json").read_text())
        row = sample["groups"][0]["rows"][0]
        shown = tab.evaluate("[...document.querySelector('.tokens').children].map((x) => x.title.split(' ')[1])")
        q = np.frombuffer(base64.b64decode(row["logp"]["data"]), np.int8) * row["logp"]["scale"] / 127
        assert [float(x) for x in shown] == pytest.approx(q.tolist(), rel=0.006)
        assert tab.evaluate("document.querySelector('.tokens').textContent") == "".join(row["pieces"])
        tab.evaluate(PRESS % json.dumps("none"))
        assert tab.evaluate(colors) == [""]
        tab.evaluate(PRESS % json.dumps("0"))
        first = json.loads((run / "rollouts" / "step_000001.json").read_text())["groups"][0]["rows"][0]
        assert tab.evaluate("document.querySelector('.tokens').textContent") == "".join(first["pieces"])
        assert (tab.errors, tab.requests) == ([], [])


def test_findings_results_plan_and_recipe_are_in_the_page_without_its_script(run, tmp_path):
    folder = tmp_path / "ill"
    shutil.copytree(run, folder)
    summary = json.loads((folder / "summary.json").read_text())
    found = {
        "pattern": "no_spread",
        "step": 3,
        "text": "most groups",
        "overrides": ["rollout.temperature=1.2"],
        "metric": "x",
    }
    (folder / "summary.json").write_text(json.dumps({**summary, "findings": [found]}))
    page = write_report([folder]).read_text("utf-8")
    for said in (
        "no_spread",
        "since step 3",
        "<code>rollout.temperature=1.2</code>",
        "rollout.prompts",
        "advantages.group_norm",
    ):
        assert said in page
    accuracy = summary["after"]["accuracy"]
    assert f"<td>accuracy</td><td>{number(summary['before']['accuracy'])}" in page
    assert f"{number(accuracy)} <span" in page
    assert (folder / "recipe.yaml").read_text().splitlines()[0] in page


def test_several_runs_have_common_plots_final_numbers_and_their_differences(run, model, tmp_path):
    words = [f"model.path={model}", *SMALL, *TRAINING, "training.learning_rate=0.01", "advantages.use=leave_one_out"]
    train(load_recipe("quickstart", words), str(tmp_path / "second"))
    page = write_report([run, tmp_path / "second"], tmp_path / "deep" / "both.html")
    with browser() as tab:
        opened(tab, page)
        assert tab.evaluate("document.querySelector('h1').textContent") == "2 runs"
        legend = tab.evaluate(
            "[...document.querySelectorAll('.panel')].find((x) => x.textContent.includes('reward/total/mean (')).innerText"
        )
        assert "first" in legend
        assert "second" in legend
        recipe = tab.evaluate("document.querySelector('#recipe').innerText")
        assert "training.learning_rate" in recipe
        assert '"leave_one_out"' in recipe
        assert "rollout.prompts" not in recipe
        tab.evaluate(PRESS % json.dumps("second"))
        assert tab.evaluate("document.querySelectorAll('.row').length") == 16
        assert (tab.errors, tab.requests) == ([], [])


def test_a_run_that_goes_on_and_one_without_a_recipe_have_a_report(run, tmp_path):
    folder = tmp_path / "on"
    folder.mkdir()
    lines = (run / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(lines + b'{"step": 99, "lo')
    with browser() as tab:
        opened(tab, write_report([folder]))
        assert "has not finished" in tab.evaluate("document.body.innerText")
        assert tab.evaluate("document.querySelectorAll('.panel canvas').length") >= 5
        assert (tab.errors, tab.requests) == ([], [])


def test_curves_are_zoomed_together_found_by_name_and_smoothed(run):
    with browser() as tab:
        opened(tab, run / FILE)
        limits = (
            "[...document.querySelectorAll('.panel > div')].filter((x) => x.chart).map((x) => x.chart.scales.x.min)"
        )
        tab.evaluate("document.querySelector('.panel > div').chart.setScale('x', { min: 2, max: 3 })")
        tab.evaluate("new Promise((done) => setTimeout(done, 100))")
        assert set(tab.evaluate(limits)) == {2}
        box = "document.querySelector('input[type=search]')"
        tab.evaluate(f"{box}.value = 'kl/', {box}.dispatchEvent(new Event('input'))")
        titles = tab.evaluate(
            "[...document.querySelectorAll('.panel:not([hidden]) h4')].filter((x) => x.offsetParent).map((x) => x.textContent)"
        )
        assert titles
        assert all("kl" in title for title in titles)
        assert tab.errors == []


# Size


def test_a_page_stays_below_its_limit_however_long_the_completions(run, tmp_path):
    folder = tmp_path / "long"
    shutil.copytree(run, folder)
    draw = random.Random(0)
    pieces = ["".join(draw.choices("abcdefghij klmnopqrst", k=5)) for _ in range(3000)]
    numbers = quantized([draw.gauss(0, 1) for _ in pieces])
    row = {
        "pieces": pieces,
        "finish": "length",
        "rewards": {"a": 1.0},
        "total": 1.0,
        "dropped": None,
        "advantage": numbers,
        "kl": numbers,
    }
    for step in range(16):
        rows = [{**row, "pieces": draw.sample(pieces, len(pieces))} for _ in range(16)]
        groups = [{"prompt": "p", "reference": None, "rows": rows} for _ in range(4)]
        (folder / "rollouts" / f"step_{step:06d}.json").write_text(json.dumps({"step": step, "groups": groups}))
    page = write_report([folder])
    assert MOST_BYTES / 20 < page.stat().st_size < 5_000_000
    with browser() as tab:
        opened(tab, page)
        assert tab.evaluate("document.querySelectorAll('.group').length") >= 1
        assert (tab.errors, tab.requests) == ([], [])


def test_a_long_curve_keeps_its_extremes():
    steps = list(range(100_000))
    values = [0.0] * len(steps)
    values[12_345], values[77_777] = 5.0, -3.0
    data = curves.data_of({"x": (steps, values)})
    xs, ys = data["steps"][0], data["metrics"]["x"][1]
    assert len(xs) <= curves.MOST_POINTS + 1
    assert {5.0, -3.0} <= set(ys)
    assert xs[ys.index(5.0)] == 12_345
    assert xs[-1] == 99_999
