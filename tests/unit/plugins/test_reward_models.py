"""Reward models of whole completions: agreement with the model called directly, labels, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from tests.helpers import runs
from tests.helpers.classifiers import (
    ENDING,
    PROMPT,
    TEMPLATE,
    TEXTS,
    TOKENIZERS,
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

ARCHITECTURES = ["llama", "qwen2", "gpt2", "bert", "deberta", "modernbert"]


# Agreement with the model called directly


@pytest.mark.proves("rewards.reward_model", how="parity", tolerance="rtol 1e-5")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tokens", list(TOKENIZERS))
def test_a_batch_scores_as_the_model_called_row_by_row(tmp_path, arch, tokens):
    """Decoders without a padding token and encoders; tokenizers that pad left or right, with <bos> in front, </s> behind, or
    [CLS], [SEP] and token types."""
    folder = save_sequence_classifier(tmp_path, arch, tokenizer=TOKENIZERS[tokens]())
    scores = loaded(folder)(given(TEXTS))
    assert scores == pytest.approx(firsts(one_by_one(folder, [PROMPT + text for text in TEXTS])), rel=1e-5, abs=1e-6)
    assert len({round(x, 6) for x in scores}) == len(TEXTS)


@pytest.mark.proves("rewards.reward_model", how="invariance", tolerance="1e-6")
@pytest.mark.parametrize(
    "pad", [None, 0, 260], ids=["no padding token", "a padding token", "padding is end of sequence"]
)
@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 2}, {"max_tokens_per_batch": 20}, {}], ids=str)
def test_the_cut_into_batches_changes_no_score(tmp_path, pad, settings):
    folder = save_sequence_classifier(tmp_path, pad_token_id=pad)
    texts = [*TEXTS, "12<eos>", "a<eos><eos>"]
    expected = firsts(one_by_one(folder, [PROMPT + text for text in texts]))
    assert loaded(folder, **settings)(given(texts)) == pytest.approx(expected, abs=1e-6)


def test_a_budget_of_tokens_bounds_each_batch_and_a_longer_row_runs_alone(tmp_path):
    source = loaded(save_sequence_classifier(tmp_path), max_tokens_per_batch=24, batch_size=3)
    seen: list[tuple[int, ...]] = []
    source._loaded.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    source(given(["", "", "", "x", "x" * 7, "x" * 30, "x" * 6]))
    assert seen == [(3, 6), (2, 12), (1, 13), (1, 36)]


def test_it_speaks_the_models_own_chat_template(tmp_path):
    folder = save_sequence_classifier(tmp_path, tokenizer=merging_tokenizer(TEMPLATE))
    scores = loaded(folder)(given(["yes", ""], prompts=[[{"role": "user", "content": "well?"}]] * 2))
    expected = one_by_one(folder, ["[u]well?|[a]yes|", "[u]well?|[a]|"], add_special_tokens=False)
    assert scores == pytest.approx(firsts(expected), abs=1e-6)
    wrapped = loaded(folder, chat=True)(given(["yes", ""], prompts=["well?"] * 2))
    assert wrapped == scores


@pytest.mark.parametrize(
    "pad", [None, 0, 260], ids=["no padding token", "a padding token", "padding is end of sequence"]
)
def test_a_template_that_ends_with_the_end_of_sequence_scores_as_plain_transformers_does(tmp_path, pad):
    folder = save_sequence_classifier(tmp_path, tokenizer=merging_tokenizer(ENDING), pad_token_id=pad)
    scores = loaded(folder)(given(["yes", "12"], prompts=[[{"role": "user", "content": "well?"}]] * 2))
    texts = [f"[u]well?<eos>[a]{text}<eos>" for text in ("yes", "12")]
    assert scores == pytest.approx(firsts(one_by_one(folder, texts, add_special_tokens=False)), abs=1e-6)


def test_a_pair_is_two_texts_with_types_of_their_own(tmp_path):
    folder = save_sequence_classifier(tmp_path, "bert", tokenizer=word_tokenizer())
    expected = firsts(one_by_one(folder, [(PROMPT, text) for text in TEXTS]))
    scores = loaded(folder, pair=True)(given(TEXTS))
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scores != pytest.approx(loaded(folder)(given(TEXTS)), abs=1e-4)


def test_long_texts_keep_their_end_behind_what_opens_them_and_the_share_is_logged(tmp_path):
    folder = save_sequence_classifier(tmp_path / "bos")
    source = loaded(folder, max_length=4)
    assert source(given(["12345", ""], prompts=["a", "a"])) == pytest.approx(
        firsts(one_by_one(folder, ["345", "a"])), abs=1e-6
    )
    assert source.take_logs() == ({}, {"truncated": [1.0, 0.0]})
    assert source.take_logs() == ({}, {})
    encoder = save_sequence_classifier(tmp_path / "cls", "bert", tokenizer=word_tokenizer())
    scores = loaded(encoder, max_length=5)(given(["x y z"], prompts=["a b "]))
    assert scores == pytest.approx(firsts(one_by_one(encoder, ["x y z"])), abs=1e-6), "[CLS] x y z [SEP]"


def test_no_row_is_longer_than_the_models_context(tmp_path):
    folder = save_sequence_classifier(tmp_path, "gpt2")
    source = loaded(folder, max_length=1000)
    (long,) = source(given(["ab" * 200], prompts=["x"]))
    assert source.take_logs()[1] == {"truncated": [1.0]}
    assert long == pytest.approx(firsts(one_by_one(folder, ["ab" * 127]))[0], abs=1e-6)


def test_a_row_without_a_token_has_no_score(tmp_path):
    folder = save_sequence_classifier(tmp_path, tokenizer=runs.tiny_policy()[1])
    assert loaded(folder)(given(["", "5"], prompts=["", ""]))[0] is None


def test_special_tokens_alone_have_the_score_that_the_model_gives_them(tmp_path):
    folder = save_sequence_classifier(tmp_path)
    texts = ["<eos>", "<bos><eos>"]
    scores = loaded(folder)(given(texts, prompts=["", ""]))
    assert scores == pytest.approx(firsts(one_by_one(folder, ["<eos>", "<eos>"])), abs=1e-6), "one <bos>, never two"


# Labels and values


def test_of_several_labels_a_number_or_a_name_chooses_and_without_one_the_choices_are_named(tmp_path):
    folder = save_three(tmp_path)
    rows = one_by_one(folder, [PROMPT + text for text in TEXTS])
    for output, index in ((0, 0), (2, 2), ("honest", 1)):
        assert loaded(folder, output=output)(given(TEXTS)) == pytest.approx([row[index] for row in rows], abs=1e-6)
    choices = r"output: 0 \('helpful'\), 1 \('honest'\), 2 \('harmless'\)"
    with pytest.raises(ValueError, match=rf"{tmp_path}' has 3 labels\. Choose the one that scores: {choices}"):
        loaded(folder)
    with pytest.raises(ValueError, match=rf"3 labels, none of them 'helpfull'\. .*{choices}"):
        loaded(folder, output="helpfull")
    with pytest.raises(ValueError, match="none of them 3"):
        loaded(folder, output=3)


def test_log_odds_and_probabilities_of_labels_that_exclude_each_other_and_of_those_that_do_not(tmp_path):
    two = save_sequence_classifier(tmp_path / "two", num_labels=2)
    (row,) = one_by_one(two, [PROMPT + "12"])
    (odds,) = loaded(two, output=1, value="log_odds")(given(["12"]))
    (chance,) = loaded(two, output=1, value="probability")(given(["12"]))
    assert odds == pytest.approx(row[1] - row[0], abs=1e-6)
    assert chance == pytest.approx(torch.tensor(row).softmax(0)[1].item(), abs=1e-6)
    many = save_three(tmp_path / "many")
    (row,) = one_by_one(many, [PROMPT + "12"])
    (chance,) = loaded(many, output=1, value="probability")(given(["12"]))
    assert chance == pytest.approx(torch.tensor(row).softmax(0)[1].item(), abs=1e-6)
    apart = save_three(tmp_path / "apart", problem_type="multi_label_classification")
    (chance,) = loaded(apart, output=1, value="probability")(given(["12"]))
    assert chance == pytest.approx(1 / (1 + math.exp(-row[1])), abs=1e-6)


# Refusals


def test_what_is_no_reward_model_is_named(tmp_path):
    language = save_model(tmp_path / "language", "AutoModelForCausalLM")
    with pytest.raises(
        ValueError, match=r"language' has no trained weights for score\.weight: .* saved as a sequence class"
    ):
        loaded(language)
    bare = save_sequence_classifier(tmp_path / "bare")
    for file in Path(bare).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"bare' has no tokenizer\. Save it with the model, or set tokenizer"):
        loaded(bare)
    assert loaded(bare, tokenizer=language)(given(TEXTS))
    with pytest.raises(ValueError, match=r"cannot load '.*nowhere': it needs a config\.json"):
        loaded(tmp_path / "nowhere")
    plain = loaded(save_sequence_classifier(tmp_path / "plain"))
    with pytest.raises(ValueError, match="plain' has no chat template"):
        plain(given(["a"], prompts=[[{"role": "user", "content": "b"}]]))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter' is an adapter without its base\. Merge them"):
        loaded(adapter)


def test_code_that_a_model_brings_along_is_not_run(tmp_path):
    folder = save_sequence_classifier(tmp_path)
    config = Path(folder) / "config.json"
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    text = config.read_text().replace('"llama"', '"strange"')
    config.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "own.Own"},', 1))
    with pytest.raises(ValueError, match="repository is not run"):
        loaded(folder)
    assert not ran.exists()
    with pytest.raises(ValueError, match=r"trust_remote_code would run code .* Remove it and convert the model"):
        loaded(folder, model_kwargs={"trust_remote_code": True})


def test_further_arguments_reach_transformers_and_those_with_a_setting_do_not(tmp_path):
    folder = save_sequence_classifier(tmp_path)
    source = loaded(folder, model_kwargs={"attn_implementation": "eager"})
    assert source._loaded.model.config._attn_implementation == "eager"
    expected = firsts(one_by_one(folder, [PROMPT + text for text in TEXTS]))
    assert source(given(TEXTS)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"model_kwargs must not contain dtype\. Set rewards\.reward_model\.dtype"):
        loaded(folder, model_kwargs={"dtype": "float16"})
    with pytest.raises(ValueError, match=r"AutoModelForSequenceClassification cannot load '.*model': .*quant"):
        loaded(
            save_sequence_classifier(tmp_path / "model"),
            model_kwargs={"quantization_config": {"quant_method": "nonsense"}},
        )
    with pytest.raises(ValueError, match="offload does not support"):
        loaded(folder, offload=True, model_kwargs={"device_map": "auto"})


def test_settings_that_cannot_go_together_are_refused_before_a_model_is_loaded():
    source = {"use": "reward_model", "model": "nowhere", "pair": True, "chat": True, "device": "gpu"}
    first, second = runs.recipe(rewards=[source]).algorithm().problems()
    assert "device must be auto, cpu, cuda or cuda:N, got 'gpu'" in first
    assert "only one of pair (two texts) and chat (one text) may be true. Set one of them to false" in second


def test_a_pair_of_a_conversation_is_refused(tmp_path):
    source = loaded(save_sequence_classifier(tmp_path, tokenizer=merging_tokenizer(TEMPLATE)), pair=True)
    with pytest.raises(ValueError, match="pair needs text prompts"):
        source(given(["a"], prompts=[[{"role": "user", "content": "b"}]]))


def test_a_tokenizer_that_is_not_fast_will_do_for_whole_completions(tmp_path):
    folder = save_sequence_classifier(tmp_path, tokenizer=ByT5Tokenizer())
    expected = firsts(one_by_one(folder, [PROMPT + text for text in TEXTS]))
    assert loaded(folder)(given(TEXTS)) == pytest.approx(expected, abs=1e-6)
