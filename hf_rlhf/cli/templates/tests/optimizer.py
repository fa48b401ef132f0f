from __future__ import annotations

import pytest
import torch
from hf_rlhf.testing import Fact, conformance
from transformers import TrainingArguments

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_every_weight_moves_by_the_learning_rate() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    plugin = MyName(learning_rate=0.01)
    optimizer = plugin.build(layer, [])
    before = layer.weight.detach().clone()
    (layer.weight * torch.tensor([[3.0, -0.001]])).sum().backward()
    optimizer.step()
    assert (layer.weight - before).flatten().tolist() == pytest.approx([-0.01, 0.01])
    assert plugin.take_logs() == {"agree_frac": 1.0}


def test_weight_decay_is_refused() -> None:
    (problem,) = MyName().check_arguments(TrainingArguments(weight_decay=0.1, use_cpu=True))
    assert "set training.weight_decay=0" in problem
