"""What settings of the model do that concern its adapter and the bits of its base. Those of bitsandbytes need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import load_model
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers import runs
from tests.integration import test_lora_quantised as quantised


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


EFFECTS["model.save_merged"] = SettingEffect(False, True, left)
EFFECTS["model.load_in_4bit"] = SettingEffect(False, True, held("load_in_4bit"))
EFFECTS["model.load_in_8bit"] = SettingEffect(False, True, held("load_in_8bit"))
EFFECTS["model.bnb_4bit_quant_type"] = SettingEffect("nf4", "fp4", held("bnb_4bit_quant_type", load_in_4bit=True))
EFFECTS["model.use_bnb_nested_quant"] = SettingEffect(False, True, held("use_bnb_nested_quant", load_in_4bit=True))
