"""A run in a notebook: a table in the cell that updates, from the loading of the model to the end or an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

CELLS = (
    """
from hf_rlhf import RLHFTrainer, load_recipe
from transformers import TrainerCallback

problems = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
small = ["rollout.prompts=4", "rollout.num_generations=2", "rollout.max_new_tokens=4", "rewards.0.use=exact_match"]
recipe = load_recipe("grpo", small)
args = recipe.training_arguments(FOLDER, max_steps=8, per_device_train_batch_size=8)
trainer = RLHFTrainer(MODEL, recipe, args, train_dataset=problems[4:], eval_dataset=problems[:4])
""",
    "trainer.evaluate(); trainer.train();",
    """
class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("in the middle")

trainer.add_callback(Fails())
try:
    trainer.train(overwrite=True)
except RuntimeError as error:
    print(error)
import time
time.sleep(2.5)
""",
)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> tuple[Any, list[tuple[int, str]]]:
    """The executed notebook, and what its cells showed on the way: (cell, HTML)."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [x.replace("FOLDER", repr(str(folder / "out"))).replace("MODEL", repr(str(tiny_model_path))) for x in CELLS]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    shown: list[tuple[int, str]] = []

    class Client(nbclient.NotebookClient):  # type: ignore[misc]
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] in ("display_data", "update_display_data"):
                shown.append((cell_index, msg["content"]["data"].get("text/html", "")))
            return super().process_message(msg, cell, cell_index)

    Client(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return book, shown


def html(cell: Any) -> list[str]:
    return [output["data"]["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]


def test_the_cell_that_makes_the_trainer_says_what_it_does(executed: Any) -> None:
    assert any(
        re.search(r"(loading the model|reading the dataset) \d", text) for cell, text in executed[1] if cell == 0
    )
    assert html(executed[0].cells[0]) == ["<div></div>"], "nothing is left of it"


def test_the_cell_that_trains_holds_one_table_that_updated(executed: Any) -> None:
    book, shown = executed
    (last,) = html(book.cells[1])
    assert "step 8/8" in last
    assert "<progress value='8' max='8'>" in last
    for label in ("reward", "KL to the reference", "length", "entropy", "held-out accuracy"):
        assert f">{label}<" in last
    assert re.search(r"[▁▂▃▄▅▆▇█]{8}", last)
    assert len([text for cell, text in shown if cell == 1]) >= 2


def test_it_stands_alone_without_the_tables_of_transformers(executed: Any) -> None:
    printed = "".join(output.get("text", "") for output in executed[0].cells[1].outputs)
    assert "{'loss'" not in printed
    assert "Training Loss" not in str(html(executed[0].cells[1]))


def test_after_an_error_the_table_stays_where_it_was_and_updates_no_more(executed: Any) -> None:
    (last,) = html(executed[0].cells[2])
    assert "step 2/8" in last or "step 1/8" in last
    assert "training" not in last
    assert "in the middle" in executed[0].cells[2].outputs[-1]["text"]
