"""`pytest --hf-rlhf-plugin PACKAGE` runs the conformance kit on every plugin of an installed package, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_rlhf.registry.host import Host, use_host
from tests.helpers.paths import ROOT

EXAMPLE = ROOT / "examples" / "hf-rlhf-quantile"

PLUGIN = '''
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource


@dataclass(kw_only=True)
class Own(RewardSource):
    """Does what it is made for."""

    name = "own"

BODY

@hookimpl
def rewards():
    return [Own]
'''
SHORT = "    def __call__(self, rollouts):\n        return [1.0]\n"
RIGHT = "    def __call__(self, rollouts):\n        return [1.0] * len(rollouts)\n"


def source(body: str) -> str:
    return PLUGIN.replace("BODY", body)


@dataclass
class Result:
    """How a run of pytest ended, and what it printed."""

    code: int
    outcomes: dict[str, int]
    text: str


class Site:
    """A folder on the path with packages as an installer leaves them, and pytest in a folder with a test that fails."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys

    def add(self, package: str, points: dict[str, str], modules: dict[str, str]) -> None:
        info = self.folder / f"{package.replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
        lines = [f"{name} = {module}" for name, module in points.items()]
        (info / "entry_points.txt").write_text("[hf_rlhf]\n" + "\n".join(lines) + "\n")
        for name, text in modules.items():
            (self.folder / name).write_text(text)

    def run(self, *arguments: str) -> Result:
        counts: Counter[str] = Counter()

        class Counting:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.when == "call" or report.skipped:
                    counts[report.outcome] += 1

        self.capsys.readouterr()
        # this process has imported what pytest would rewrite, and pytest may warn of it
        plain = ["-p", "no:cacheprovider", "-p", "no:warnings", "-c", "/dev/null", "--rootdir", ".", "--color=no"]
        with use_host(Host(disable="")):
            code = pytest.main([*plain, *arguments], plugins=[Counting()])
        out, err = self.capsys.readouterr()
        return Result(int(code), dict(counts), " ".join((out + err).split()))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    (tmp_path / "test_own.py").write_text("def test_of_the_folder():\n    assert False\n")
    yield Site(folder, capsys)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_example_package_conforms(site):
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copytree(EXAMPLE / "hf_rlhf_quantile", site.folder / "hf_rlhf_quantile")
    site.add(project["name"], project["entry-points"]["hf_rlhf"], {})
    result = site.run("--hf-rlhf-plugin", "hf-rlhf-quantile", "-v")
    assert result.code == 0
    assert set(result.outcomes) == {"passed"}
    assert result.outcomes["passed"] >= 20
    assert "quantile::padding columns change nothing PASSED" in result.text
    assert "test_of_the_folder" not in result.text


def test_what_is_wrong_is_said_in_a_sentence_and_fails(site):
    site.add("short", {"rewards.own": "short_own"}, {"short_own.py": source(SHORT)})
    result = site.run("--hf-rlhf-plugin", "short")
    assert result.code == pytest.ExitCode.TESTS_FAILED
    assert (
        "rewards.own: it returns one number, Spans, TokenScores or None per row it returns 1 numbers for 4 rows"
        in result.text
    )
    assert ".py:" not in result.text, "no traceback"
    assert result.outcomes["failed"] == 1
    assert result.outcomes["skipped"] >= 3, "what cannot be asked of it"


def test_with_paths_their_tests_run_as_well_and_k_chooses(site):
    site.add("right", {"rewards.own": "right_own"}, {"right_own.py": source(RIGHT)})
    both = site.run("--hf-rlhf-plugin", "right", "test_own.py").outcomes
    assert both["failed"] == 1
    assert both["passed"] >= 8
    chosen = site.run("--hf-rlhf-plugin", "right", "-k", "own and order", "-v")
    assert chosen.outcomes == {"passed": 1}
    assert "the order of the rows changes no score PASSED" in chosen.text


def test_plugins_without_defaults_or_with_a_setup_are_skipped_with_the_way_to_test_them(site):
    setting = '    path: str\n    """Where it is."""\n\n' + RIGHT
    setup = "    def setup(self, context):\n        self.model = 1\n\n" + RIGHT
    modules = {"has_setting.py": source(setting), "has_setup.py": source(setup).replace('"own"', '"other"')}
    site.add("both", {"rewards.own": "has_setting", "rewards.other": "has_setup"}, modules)
    result = site.run("--hf-rlhf-plugin", "both", "-rs")
    assert result.outcomes == {"skipped": 2}
    assert (
        "it needs path. Test it with settings of your own: `for fact in conformance(Own(path=...)): fact()`"
        in result.text
    )
    assert "it needs setup(context)" in result.text


def test_a_plugin_that_cannot_be_made_fails_and_says_why(site):
    site.add("broken", {"rewards.own": "broken_own"}, {"broken_own.py": "import nothing_like_this\n"})
    result = site.run("--hf-rlhf-plugin", "broken")
    assert result.outcomes == {"failed": 1}
    assert "rewards.own: it can be made with its default settings" in result.text
    assert "No module named 'nothing_like_this'" in result.text


def test_a_plugin_is_closed_after_its_facts(site):
    body = "    def close(self):\n        print('closed once')\n\n" + RIGHT
    site.add("closing", {"rewards.own": "closing_own"}, {"closing_own.py": source(body)})
    assert site.run("--hf-rlhf-plugin", "closing", "-s").text.count("closed once") == 1


def test_a_file_can_be_named_too(site):
    (site.folder.parent / "mine.py").write_text(source(RIGHT))
    assert set(site.run("--hf-rlhf-plugin", "mine.py").outcomes) == {"passed"}
    missing = site.run("--hf-rlhf-plugin", "other.py")
    assert missing.code == pytest.ExitCode.USAGE_ERROR
    assert "no such file" in missing.text


def test_a_package_that_offers_nothing_is_named_with_those_that_do(site):
    result = site.run("--hf-rlhf-plugin", "hf_rlfh")
    assert result.code == pytest.ExitCode.USAGE_ERROR
    assert "no installed package named hf_rlfh offers plugins. Did you mean 'hf_rlhf'?" in result.text


def test_without_the_option_nothing_happens_and_nothing_is_imported(site):
    assert site.run().outcomes == {"failed": 1}
    code = "import sys, hf_rlhf.pytest_plugin as p; assert 'torch' not in sys.modules and 'hf_rlhf.axes' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
