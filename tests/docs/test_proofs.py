"""Every plugin of this package is proven by a test that says so, and the table of proofs can be trusted."""

from __future__ import annotations

import math
from importlib.metadata import entry_points

import pytest

from tests.helpers.documentation import proofs
from tests.helpers.paths import ROOT

PLUGINS = sorted({point.name for point in entry_points(group="hf_rlhf") if point.dist and point.dist.name == "hf_rlhf"})


@pytest.fixture(scope="module")
def found():
    """Every proof in these tests."""
    return proofs.read(ROOT / "tests")


def test_every_plugin_is_proven(found):
    without = set(PLUGINS) - {proof.plugin for proof in found}
    assert not without, f'no test says @pytest.mark.proves("{sorted(without)[0]}", ...); nor for: {sorted(without)[1:]}'


def test_every_proof_is_of_a_plugin_that_there_is(found):
    wrong = [f"{proof.file}::{proof.test}: {proof.plugin}" for proof in found if proof.plugin not in PLUGINS]
    assert not wrong


def test_every_proof_stands_once(found):
    assert len(found) == len(set(found))


def test_every_algorithm_plugin_is_proven_to_rounding(found):
    """Formulas are checked to 1e-9 or so in float64; what meets a float32 model may be checked to its rounding. Words in
    place of a number (a bias that is there) are no tolerance."""
    models = ("rollout", "rewards", "critic", "reference", "optimizer")
    for plugin in PLUGINS:
        if plugin.partition(".")[0] not in models:
            best = min((number(proof.tolerance) for proof in found if proof.plugin == plugin), default=0.0)
            assert best <= 1e-6, f"{plugin} is proven to {best:g} at best"


def number(tolerance: str) -> float:
    """The number at the start, infinity where there is none."""
    try:
        return 0.0 if tolerance == "exact" else float(tolerance.partition(" ")[0])
    except ValueError:
        return math.inf


def test_a_proof_is_read_from_its_decorator(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "test_two.py").write_text(
        "import pytest\n\n"
        '@pytest.mark.proves("a.b", "c.d", how="parity", tolerance="1e-6")\n'
        '@pytest.mark.proves("a.b", how="closed form", tolerance="exact")\n'
        '@pytest.mark.parametrize("x", [1])\n'
        "def test_it(x):\n    pass\n\n"
        "class TestIn:\n"
        '    @pytest.mark.proves("e.f", how="end to end", tolerance="0")\n'
        "    def test_inside(self):\n        pass\n"
    )
    (tmp_path / "helper.py").write_text('@pytest.mark.proves("no.test", how="parity", tolerance="0")\ndef f(): pass\n')
    found = proofs.read(tmp_path)
    read = [(p.plugin, p.test, p.how, p.tolerance) for p in found]
    assert {p.file for p in found} == {"room/test_two.py"}
    assert read == [
        ("a.b", "test_it", "closed form", "exact"),
        ("a.b", "test_it", "parity", "1e-6"),
        ("c.d", "test_it", "parity", "1e-6"),
        ("e.f", "test_inside", "end to end", "0"),
    ]


@pytest.mark.parametrize(
    ("decorator", "message"),
    [
        ('proves(how="parity", tolerance="0")', "needs the plugins"),
        ('proves("a.b", how="parity")', "needs how"),
        ('proves("a.b", how="parity", tolerance="0", note="x")', "nothing else"),
        ('proves("a.b", how="by eye", tolerance="0")', "choose from"),
        ('proves(f"a.{name}", how="parity", tolerance="0")', "written out"),
        ('proves("a.b", how="parity", tolerance=1e-6)', "written out"),
    ],
)
def test_a_proof_that_is_not_written_out_is_refused(tmp_path, decorator, message):
    (tmp_path / "test_one.py").write_text(f"@pytest.mark.{decorator}\ndef test_it():\n    pass\n")
    with pytest.raises(ValueError, match=message):
        proofs.read(tmp_path)


def test_what_is_no_test_proves_nothing(tmp_path):
    (tmp_path / "test_one.py").write_text('@pytest.mark.proves("a.b", how="parity", tolerance="0")\ndef it(): pass\n')
    with pytest.raises(ValueError, match="no test function"):
        proofs.read(tmp_path)
