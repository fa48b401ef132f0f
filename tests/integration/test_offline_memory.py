"""The plan of a recipe without rollouts: its memory forecast, and what packing does to steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.cli.runs.run import check, train
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe
from hf_rlhf.runtime import peak_memory
from hf_rlhf.training.memory.estimate import Estimate
from hf_rlhf.training.offline.memory_estimate import TILE, estimate_offline
from tests.helpers import offline_runs as off
from tests.helpers import sft_runs as sft

LETTERS = 150
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
RECIPES = ("sft", "rm", "rm_process", "rm_token", "dpo")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Wide enough for its activations to be seen beside what else a process holds."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = off.save_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **SIZES, **ids)).save_pretrained(folder)
    return folder


def recipe(name: str, model: Path, data: Path, *words: str) -> OfflineRecipe:
    small = [f"model.path={model}", f"dataset.path={data}", "dataset.held_out=0", "training.use_cpu=true"]
    small += ["training.max_steps=2", "training.per_device_train_batch_size=16", *words]
    made = load_recipe(name, small)
    assert isinstance(made, OfflineRecipe)
    return made


def rows(name: str, folder: Path) -> Path:
    """Each as long as any."""
    text = "ab" * (LETTERS // 2)
    row = {"prompt": "1?", "completion": text, "chosen": text, "rejected": "z" * LETTERS}
    kept = ("prompt", "completion") if name == "sft" else ("prompt", "chosen", "rejected")
    return off.write(folder / f"{name}.jsonl", [{key: row[key] for key in kept}] * 32)


def estimate(made: OfflineRecipe, **more: Any) -> Estimate:
    from transformers import TrainingArguments

    args = TrainingArguments(**{"output_dir": "nowhere", "report_to": "none", **made.training})
    return estimate_offline(made.model, made.trainer(), args, **more)


def test_weights_optimizer_and_reference_by_hand(model, tmp_path):
    """Only DPO has a second model, and none beside an adapter or with log-probs from before. Buffers count as weights."""
    from transformers import AutoModelForCausalLM

    weights = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(model).parameters()) / peak_memory.MIB
    data = rows("dpo", tmp_path)
    for words, reference in (([], weights), (["trainer.reference=precomputed"], None), (["model.lora={r: 4}"], None)):
        found = estimate(recipe("dpo", model, data, *words)).phases["update"]
        assert found.get("reference") == (None if reference is None else pytest.approx(reference, rel=1e-3))
        if "model.lora={r: 4}" in words:
            assert found["optimizer"] < weights / 5
            assert found["weights"] > weights
        else:
            assert found["weights"] == pytest.approx(weights, rel=1e-3)
            assert found["optimizer"] == pytest.approx(2 * weights, rel=1e-3)
    assert "reference" not in estimate(recipe("sft", model, rows("sft", tmp_path))).phases["update"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_trainer_is_estimated(name, model, tmp_path):
    found = estimate(load_recipe(name, [f"model.path={model}"]), tokens=20)  # type: ignore[arg-type]
    assert list(found.phases) == ["evaluation", "update"]
    assert not found.notes


def test_longer_rows_more_of_them_and_kept_activations_take_more(model, tmp_path):
    data = rows("rm", tmp_path)

    def activations(*words: str, tokens: int = 100) -> float:
        return estimate(recipe("rm", model, data, *words), tokens=tokens).phases["update"]["activations"]

    plain = activations()
    assert activations(tokens=200) > 1.9 * plain
    assert activations("training.per_device_train_batch_size=32") == pytest.approx(2 * plain, rel=0.05)
    assert activations("training.gradient_checkpointing=true") < plain / 2


def test_the_room_for_logits_is_that_of_trl():
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert TILE == (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def test_what_cannot_be_known_is_said(model, tmp_path):
    plan = check(recipe("rm", model, rows("rm", tmp_path)), str(tmp_path / "out"))
    assert plan.memory["update"]["weights"] > 0
    assert plan.memory_notes == ["rows of 256 tokens are assumed, the most that trainer.max_length and the model allow"]
    assert estimate(load_recipe("rm", ["model.path=null"])).notes == ["not estimated: no model is named"]  # type: ignore[arg-type]
    missing = estimate(load_recipe("rm", ["model.path=nobody/nothing-of-the-kind"])).notes  # type: ignore[arg-type]
    assert missing[0].startswith("not estimated: ")


def test_the_plan_counts_packed_sequences(tmp_path):
    """Before rows are encoded their number is a bound; then the plan has as many steps as the run."""
    words = ("trainer.packing=true", "trainer.max_length=40", "training.max_steps=-1", "training.num_train_epochs=2")
    made = sft.recipe(tmp_path, *words)
    before = {name: value for name, value, _ in check(made, str(tmp_path / "out")).arithmetic}
    assert before["sequences of packed rows"] == "at most 22"
    assert before["optimizer steps"] == "at most 12"
    summary = train(made, str(tmp_path / "out"))
    after = {name: value for name, value, _ in summary["plan"]["arithmetic"]}
    assert int(after["sequences of packed rows"]) < 22
    assert after["optimizer steps"] == str(summary["steps"])
    assert summary["steps"] < 12
    alone = {
        name: value for name, value, _ in check(sft.recipe(tmp_path, *words[2:]), str(tmp_path / "out")).arithmetic
    }
    assert "sequences of packed rows" not in alone
    assert (alone["rows per micro-batch"], alone["optimizer steps"]) == ("4", "12")
