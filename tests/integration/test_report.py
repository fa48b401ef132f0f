"""report.html of real runs, looked at in Chromium: no console error, no request, whatever the run holds."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.report.build import FILE, write_report
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import tiny_policy
from tests.helpers import offline_runs as off
from tests.helpers.browser import Page, browser

SMALL = ["rollout.prompts=8", "rollout.num_generations=4", "rollout.max_new_tokens=5", "evaluation.prompts=8"]
TRAINING = ["training.max_steps=4", "training.use_cpu=true"]


READY = """new Promise((done) => {
  const asked = setInterval(() => { if ("ready" in document.documentElement.dataset) { clearInterval(asked); done(); } }, 10);
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


def test_a_folder_without_a_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"RUN must be a folder with a run, got .*empty"):
        write_report([tmp_path / "empty"])
    with pytest.raises(UserError, match=rf"Name its runs: {run}"):
        write_report([run.parent])
