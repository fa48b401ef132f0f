"""What is refused, or said, before a model is loaded."""

from __future__ import annotations

import pytest

from tests.helpers import runs


@pytest.mark.parametrize(("rows", "max_steps", "warned"), [(5, -1, True), (4, -1, False), (5, 2, False)])
def test_prompts_that_an_epoch_leaves_out_are_said_once(rows, max_steps, warned, tmp_path, caplog):
    training = {"max_steps": max_steps, "num_train_epochs": 1}
    rollout = {**runs.SCRIPTED, "prompts": 2}
    made = runs.trained(tmp_path, data=runs.problems(rows), rollout=rollout, training=training)
    assert made.stream.epoch == (min(1, 4 / rows) if max_steps < 0 else 2 / rows)
    said = [text for text in caplog.messages if "leaves 1 of the 5 prompts out" in text]
    assert len(said) == warned
