"""What settings of the model do that concern its adapter and the bits of its base. Those of bitsandbytes need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import test_lora_quantised as quantised
from bites import BITES, Bite

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import load_model


def left(folder: Path, save_merged: Any) -> list[str]:
    """The weights that a run leaves in its folder."""
    pytest.importorskip("peft")
    model = {"path": quantised.save(folder / "model"), "lora": {"r": 2}, "save_merged": save_merged}
    made = runs.trainer(folder / str(save_merged), model=model)
    made.save_model()
    made.close()
    return sorted(file.name for file in made.output_dir.glob("*.safetensors"))


def held(setting: str, **others: Any) -> Callable[[Path, Any], Any]:
    """How the first projection of a base is held, and the model's logits."""

    def show(folder: Path, value: Any) -> Any:
        pytest.importorskip("bitsandbytes")
        path = quantised.save(folder / "model")
        model = load_model(Model(path=path, **{**others, setting: value}), lora=True)
        weight: Any = model.get_submodule("model.layers.0.self_attn.q_proj").weight
        nested = getattr(getattr(weight, "quant_state", None), "nested", None)
        return [str(weight.dtype), nested, quantised.logits(model)]

    return show


BITES["model.save_merged"] = Bite(False, True, left)
BITES["model.load_in_4bit"] = Bite(False, True, held("load_in_4bit"))
BITES["model.load_in_8bit"] = Bite(False, True, held("load_in_8bit"))
BITES["model.bnb_4bit_quant_type"] = Bite("nf4", "fp4", held("bnb_4bit_quant_type", load_in_4bit=True))
BITES["model.use_bnb_nested_quant"] = Bite(False, True, held("use_bnb_nested_quant", load_in_4bit=True))
