"""How reward models lie in memory: number formats, devices, sharing, and what becomes of rows that fail."""

from __future__ import annotations

import gc
import math
import pickle
import weakref

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Context
from hf_rlhf.modeling.offload import ToMainMemory, tensors_of
from tests.helpers import runs
from tests.helpers.classifiers import (
    CPU,
    PROMPT,
    TEXTS,
    direct,
    firsts,
    given,
    loaded,
    merging_tokenizer,
    one_by_one,
    save_model,
    save_sequence_classifier,
    save_three,
    word_tokenizer,
)
from tests.helpers.flaky_rewards import score


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_format_runs_on_the_cpu_in_eval_mode_without_gradients(tmp_path, dtype):
    folder = save_sequence_classifier(tmp_path, attention_dropout=0.5)
    source = loaded(folder, dtype=dtype)
    model = source._loaded.model
    assert model.dtype == getattr(torch, dtype)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = firsts(one_by_one(folder, [PROMPT + text for text in TEXTS]))
    assert source(given(TEXTS)) == pytest.approx(expected, abs={"float64": 1e-6, "float32": 1e-6}.get(dtype, 0.05))
    with torch.autocast("cpu", torch.bfloat16):
        assert source(given(TEXTS)) == source(given(TEXTS))
        under = source(given(TEXTS))
    assert under == source(given(TEXTS)), "autocast does not reach it"


def test_auto_keeps_the_format_in_which_the_weights_were_saved(tmp_path):
    folder = save_sequence_classifier(tmp_path)
    direct("SequenceClassification", folder).to(torch.bfloat16).save_pretrained(folder)
    assert loaded(folder, dtype="auto")._loaded.model.dtype == torch.bfloat16


def context(device: str) -> Context:
    return Context(device=torch.device(device), tokenizer=None, policy=None)


def test_device_and_offload_say_where_the_weights_lie(tmp_path):
    folder = save_sequence_classifier(tmp_path)
    for settings, where in (({}, "meta"), ({"device": "cpu"}, "cpu"), ({"offload": True}, "cpu")):
        source = load_plugin("rewards", "reward_model", model=folder, **settings)
        source.setup(context("meta"))
        assert {p.device.type for p in source._loaded.model.parameters()} == {where}
    with pytest.raises(ValueError, match=r"reward_model.device must be auto, cpu, cuda or cuda:N, got 'gpu0'"):
        loaded(folder, device="gpu0")
    with pytest.raises(ValueError, match=r"device must exist, got 'cuda:77' on a machine with \d+ CUDA devices"):
        loaded(folder, device="cuda:77")


def test_offloaded_weights_visit_the_device_and_the_ones_at_home_come_back(tmp_path):
    source = load_plugin("rewards", "reward_model", model=save_sequence_classifier(tmp_path), offload=True)
    source.setup(context("meta"))
    held = source._loaded
    held.weights = ToMainMemory(tensors_of(held.model), CPU, at_home=True)  # in place of a device that is not here
    before = {name: (x.data_ptr(), x.clone()) for name, x in held.model.state_dict().items()}
    with source._session():
        assert all(x.data_ptr() != before[name][0] for name, x in held.model.state_dict().items())
    with pytest.raises(ZeroDivisionError), source._session():
        raise ZeroDivisionError
    for name, x in held.model.state_dict().items():
        assert x.data_ptr() == before[name][0]
        assert torch.equal(x, before[name][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_scores_are_the_same_bits(tmp_path):
    folder = save_sequence_classifier(tmp_path)
    scores = []
    for offload in (False, True):
        source = load_plugin("rewards", "reward_model", model=folder, offload=offload, device="cuda")
        source.setup(context("cuda"))
        scores.append([source(given(TEXTS)), source(given(TEXTS))])
        assert next(source._loaded.model.parameters()).device.type == ("cpu" if offload else "cuda")
    assert scores[0] == scores[1]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_is_quantised_while_it_is_loaded(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    folder = save_sequence_classifier(tmp_path, hidden_size=64, intermediate_size=128)
    source = loaded(folder, model_kwargs={"quantization_config": {f"load_in_{bits}bit": True}})
    assert f"{bits}bit" in type(source._loaded.model.model.layers[0].mlp.up_proj).__name__
    assert all(math.isfinite(score) for score in source(given(TEXTS)))
    if bits == 8:
        assert source(given(TEXTS)) == pytest.approx(loaded(folder)(given(TEXTS)), abs=0.5)


def test_sources_with_one_model_hold_it_once_and_it_is_freed_with_the_last(tmp_path):
    folder = save_three(tmp_path)
    one, other = loaded(folder, output=0, batch_size=2), loaded(folder, output=2, value="probability")
    assert one._loaded is other._loaded
    assert loaded(folder, output=0, dtype="float64")._loaded is not one._loaded
    rows = one_by_one(folder, [PROMPT + text for text in TEXTS])
    assert one(given(TEXTS)) == pytest.approx([row[0] for row in rows], abs=1e-6)
    freed = weakref.ref(one._loaded.model)
    one.close()
    gc.collect()
    assert freed() is not None
    assert other(given(TEXTS))
    other.close()
    gc.collect()
    assert freed() is None
    with pytest.raises(RuntimeError, match="reward_model is not loaded"):
        one(given(TEXTS))


def test_files_that_were_written_again_are_loaded_again(tmp_path):
    first = loaded(save_sequence_classifier(tmp_path, seed=1))
    second = loaded(save_sequence_classifier(tmp_path, seed=2))
    expected = firsts(one_by_one(tmp_path, [PROMPT + text for text in TEXTS]))
    assert second(given(TEXTS)) == pytest.approx(expected, abs=1e-6)
    assert first(given(TEXTS)) != pytest.approx(expected, abs=1e-3)


def test_two_models_in_one_run_score_in_their_own_words(tmp_path):
    """Each with its own tokenizer; their scores add up by their weights."""
    paths = [
        save_sequence_classifier(tmp_path / "one", "llama"),
        save_sequence_classifier(tmp_path / "two", "bert", tokenizer=word_tokenizer()),
    ]
    sources = [
        {"use": "reward_model", "label": f"rm{i}", "model": path, "weight": i + 1.0} for i, path in enumerate(paths)
    ]
    made = runs.trainer(tmp_path, rewards=sources, advantages="group_mean", training={"max_steps": 1})
    try:
        asked = given(TEXTS)
        found = score(list(zip(made.algorithm.labels(), made.algorithm.rewards, strict=True)), asked)
        for label, path in zip(("rm0", "rm1"), paths, strict=True):
            expected = firsts(one_by_one(path, [PROMPT + text for text in TEXTS]))
            assert found[label].tolist() == pytest.approx(expected, abs=1e-6)
        made.train()
        assert runs.entries(made)
    finally:
        made.close()


def test_a_pickled_source_loads_its_model_anew(tmp_path):
    source = loaded(save_sequence_classifier(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    with pytest.raises(RuntimeError, match="not loaded"):
        copy(given(TEXTS))
    copy.load_model(CPU)
    assert copy(given(TEXTS)) == source(given(TEXTS))


def test_a_row_that_is_not_a_number_changes_no_other(tmp_path):
    folder = save_sequence_classifier(tmp_path, "llama")
    before = loaded(folder)(given(TEXTS))
    model = direct("SequenceClassification", folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[merging_tokenizer()("z")["input_ids"][-1]] = math.nan
    model.save_pretrained(folder)
    source = loaded(folder)
    scores = source(given(TEXTS))
    assert math.isnan(scores[4])
    assert scores[:4] == before[:4]
    missing = score([("rm", source)], given(TEXTS))["rm"].isnan()
    assert missing.tolist() == [False, False, False, False, True]


def test_a_critic_may_start_from_the_label_that_scores(tmp_path):
    folder = save_three(tmp_path)
    source = loaded(folder, output="honest")
    fresh = source.fresh_model(CPU)
    assert torch.equal(fresh.score.weight, source._loaded.model.score.weight[1:2])
    assert fresh is not source._loaded.model
    assert source._loaded.model.score.out_features == 3
    assert source.runs_model


def test_tied_weights_are_one_on_the_device_too(tmp_path):
    folder = save_model(tmp_path, "AutoModelForCausalLM", pad_token_id=0, tie_word_embeddings=True)
    model = direct("CausalLM", folder)
    held = ToMainMemory(tensors_of(model), CPU, at_home=True)
    home = model.lm_head.weight.data_ptr()
    for move, at_home in ((held.load, False), (held.offload, True)):
        move()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert (model.lm_head.weight.data_ptr() == home) == at_home
