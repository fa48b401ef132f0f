"""The benchmarks for GPUs: their code runs on a CPU at small size, and their pages say what has not been run."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import gpu, gpu_page, reproduce
from hf_rlhf import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.tiers import slow

TITLES = {name: case.title for name, case in gpu.CASES.items()}
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["loop", "layouts", "head", "packed", *slow("trl")])
def test_a_case_runs_at_small_size(name):
    found = json.loads(json.dumps(gpu.one(name, tiny=True, cycles=1)))
    page = gpu_page.page(
        {"cases": {name: found}, "device": "a CPU", "tiny": True, "versions": {"torch": "2"}},
        TITLES,
    )
    assert "A rehearsal of the code" in page
    if name == "layouts":
        assert found["rows"]["packed"]["apart"] < 0.1
    if name in ("packed", "trl"):
        assert found["phases"]["rollout"] > 0
        assert found["phases"]["update"] > 0
        assert f"| {TITLES[name]} | {found['seconds']:.2f} (" in page


def test_a_case_that_a_machine_cannot_run_says_what_it_lacks(monkeypatch):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: 1)
    assert gpu.CASES["flex"].lacks() is None
    assert gpu.CASES["vllm-nccl"].lacks() == "needs 2 GPUs"
    assert gpu.CASES["vllm-ipc"].lacks() == "VLLM_PYTHON names no environment with vLLM"
    assert gpu.CASES["trl-vllm"].lacks() == "vLLM is not installed beside TRL"
    page = gpu_page.page(
        {
            "cases": {"vllm-nccl": {"not_run": "needs 2 GPUs"}, "trl": {"failed": "OutOfMemoryError: x"}},
            "device": "a GPU",
            "versions": {},
        },
        TITLES,
    )
    assert f"| {TITLES['vllm-nccl']} | not run: needs 2 GPUs |" in page
    assert f"| {TITLES['trl']} | failed: OutOfMemoryError: x |" in page
    assert f"| {TITLES['flex']} | not run |" in page


def test_the_pages_are_those_of_their_figures_and_say_that_nothing_has_been_run():
    assert (RESULTS / "gpu.md").read_text() == gpu_page.page({"cases": {}}, TITLES)
    assert (RESULTS / "reproduce.md").read_text() == reproduce.page({})
    assert "not run" in reproduce.page({})
    assert not (RESULTS / "gpu.json").exists()


@pytest.mark.slow
def test_the_reproduction_trains_evaluates_and_is_read_again(tmp_path, monkeypatch):
    words = [
        "reproduce",
        "math",
        "--tiny",
        "--seeds",
        "0",
        "--output-dir",
        str(tmp_path),
        "--json",
        f"{tmp_path}/x.json",
    ]
    monkeypatch.setattr(sys, "argv", words)
    reproduce.main()
    found: dict[str, Any] = json.loads((tmp_path / "x.json").read_text())
    assert [row["step"] for row in found["tasks"]["math"]["0"]] == [0, 1, 2]
    assert "| 2 | 0.50 to 0.73 |" in (tmp_path / "x.md").read_text()
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *args, **kwargs: pytest.fail("it has been run"))
    reproduce.main()


@pytest.mark.parametrize(
    ("task", "dataset"), [("gsm8k", "openai/gsm8k"), ("math", "DigitalLearningGmbH/MATH-lighteval")]
)
def test_the_recipe_of_the_reproduction_is_one_for_both_tasks(task, dataset):
    recipe = load_recipe(str(reproduce.RECIPE), reproduce.OVERRIDES[task])
    assert recipe.dataset.path == dataset
    assert recipe.dataset.prompt_template.endswith("\nReason step by step, and put the final answer in \\boxed{{}}.")
    assert max(reproduce.BANDS[task]) == recipe.training["max_steps"]
    assert reproduce.band(task, 10) == pytest.approx(
        [sum(x) / 2 for x in zip(*(reproduce.BANDS[task][k] for k in (0, 20)), strict=True)]
    )
