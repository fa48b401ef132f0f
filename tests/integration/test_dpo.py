"""trainer.dpo: rows, references, what does not depend on batches, what is measured, checkpoints."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.data.sources import DatasetError
from hf_rlhf.testing import tiny_policy
from hf_rlhf_plugins.trainer._dpo_measures import of_policy
from hf_rlhf_plugins.trainer._dpo_rows import Pairs, pair_of, shared
from hf_rlhf_plugins.trainer._measures import wilson
from tests.helpers import dpo_runs as dpo
from tests.helpers import offline_runs as off

TOKENIZER = tiny_policy()[1]


def text(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


# Rows


def test_texts_end_with_the_end_of_sequence_token_once():
    prompt, chosen, rejected = pair_of({"prompt": "1+1=", "chosen": "2", "rejected": "3<eos>"}, TOKENIZER)
    assert text(prompt) == "1+1="
    assert chosen == [*prompt, *TOKENIZER("2")["input_ids"], TOKENIZER.eos_token_id]
    assert (len(rejected), rejected[-1]) == (6, TOKENIZER.eos_token_id)
    assert pair_of({"prompt": "", "chosen": "a", "rejected": "b"}, TOKENIZER)[0] == []


def test_conversations_are_rendered_and_the_answer_is_the_completion():
    question, answers = {"role": "user", "content": "hi"}, ("good", "bad")
    given = {
        name: [{"role": "assistant", "content": x}] for name, x in zip(("chosen", "rejected"), answers, strict=True)
    }
    apart = pair_of({"prompt": [question], **given}, TOKENIZER)
    assert [text(ids) for ids in apart] == [
        "user: hi\nassistant: ", "user: hi\nassistant: good\n", "user: hi\nassistant: bad\n"
    ]  # fmt: skip
    whole = {name: [question, *messages] for name, messages in given.items()}
    assert pair_of(whole, TOKENIZER) == apart
    assert pair_of({"prompt": [question], "chosen": answers[0], "rejected": answers[1]}, TOKENIZER) == apart


@pytest.mark.parametrize(("row", "message"), [
    ({"chosen": "a", "rejected": "b"}, "need a column prompt"),
    ({"prompt": "p", "chosen": 5, "rejected": "b"}, "chosen must be a text"),
    ({"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}, "the same messages"),
    ({"chosen": 4, "rejected": 5}, "chosen must be a text or a list of messages"),
])  # fmt: skip
def test_a_row_that_is_no_pair_is_refused_with_its_number(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pair_of(row, TOKENIZER)
    with pytest.raises(DatasetError, match=rf"dataset, row 1 .*{message}"):
        dpo.run(tmp_path, "dataset.held_out=0", given=[row])


def test_tokens_that_merge_across_the_border_belong_to_the_completion():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {x: i for i, x in enumerate(["<eos>", "a", "b", "c", "ab", "<unk>"])}
    pairs = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    merging = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<eos>", pad_token="<eos>")
    assert pair_of({"prompt": "ca", "chosen": "b", "rejected": "c"}, merging) == ([3], [3, 4, 0], [3, 1, 3, 0])


def test_a_row_is_as_long_as_its_longer_side_with_the_prompt(tmp_path):
    given = [{"prompt": "p" * 9, "chosen": "a" * n, "rejected": "z"} for n in (1, 5, 6)]
    trainer = dpo.made(tmp_path, "trainer.max_length=15", given=given)
    assert [len(row["chosen_ids"]) for row in trainer.train_dataset] == [11, 15]


def test_equal_completions_are_dropped():
    plugin = load_plugin("trainer", "dpo")
    assert plugin.encode({"prompt": "1", "chosen": "2", "rejected": "2"}, TOKENIZER) is None


def test_a_batch_marks_the_tokens_behind_the_prompt():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]},
        {"prompt_ids": [5], "chosen_ids": [5], "rejected_ids": [5, 4]},
    ]
    batch = Pairs(0, torch.float64)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 0, 0, 0], [5, 6, 8, 9], [5, 4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert shared([1, 2], [1, 2, 3]) == 2


def test_batches_are_those_of_trl(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = list(dpo.small(tmp_path).train_dataset)
    behind = [
        {"prompt_ids": row["prompt_ids"],
         **{name: row[name][len(row["prompt_ids"]) :] for name in ("chosen_ids", "rejected_ids")}} for row in rows
    ]  # fmt: skip
    theirs = DataCollatorForPreference(pad_token_id=0)(behind)
    ours = Pairs(0, torch.float64)(rows)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# What does not depend on batches


@pytest.mark.parametrize("loss_type", ["sigmoid", "fidelity", "ipo"])
def test_padding_and_the_size_of_batches_change_nothing(loss_type, tmp_path):
    trainer = dpo.moved(dpo.small(tmp_path, loss_type=loss_type))
    whole, gradient = dpo.loss_and_gradient(trainer)
    rows = list(trainer.train_dataset)
    single = [dpo.loss_and_gradient(trainer, trainer._prepare_inputs(trainer.data_collator([row]))) for row in rows]
    assert whole == pytest.approx(sum(loss for loss, _ in single) / len(rows), abs=1e-6)
    assert (gradient - sum(g for _, g in single) / len(rows)).norm() < 1e-6 * gradient.norm()
    batch = dpo.batch_of(trainer)
    wider = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in batch.items()}
    assert dpo.loss_and_gradient(trainer, wider)[0] == pytest.approx(whole, abs=1e-6)
    garbage = {**wider, "input_ids": wider["input_ids"].masked_fill(wider["attention_mask"] == 0, 50)}
    assert dpo.loss_and_gradient(trainer, garbage)[0] == pytest.approx(whole, abs=1e-6)


# References


def test_the_reference_stays_what_the_model_was_at_the_start(tmp_path):
    trainer = dpo.made(tmp_path, given=off.rows("reward_model"))
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(start, trainer.ref_model.parameters(), strict=True))
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(start, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("loss_type", ["sigmoid", "fidelity"])
def test_precomputed_log_probs_give_the_loss_of_a_frozen_copy(loss_type, tmp_path):
    frozen, precomputed = (
        dpo.small(tmp_path, loss_type=loss_type, reference=name) for name in ("frozen", "precomputed")
    )
    assert precomputed.ref_model is None
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(precomputed.train_dataset.column_names)
    found = [dpo.loss_and_gradient(dpo.moved(trainer)) for trainer in (frozen, precomputed)]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert (found[0][1] - found[1][1]).norm() < 1e-6 * found[0][1].norm()


@pytest.mark.parametrize("reference", ["frozen", "precomputed"])
def test_the_model_without_its_adapter_is_a_frozen_copy(reference, tmp_path):
    pytest.importorskip("peft")
    words = "model.lora={r: 2}"
    own, other = dpo.made(tmp_path, words), dpo.made(tmp_path, words, f"trainer.reference={reference}")
    assert own.ref_model is None
    assert (other.ref_model is None) == (reference == "precomputed")
    assert dpo.loss_and_gradient(own)[0] == pytest.approx(math.log(2), abs=1e-12)
    found = [dpo.loss_and_gradient(dpo.moved(trainer, 1.0)) for trainer in (own, other)]
    assert abs(found[0][0] - math.log(2)) > 1e-3
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert (found[0][1] - found[1][1]).norm() < 1e-6 * found[0][1].norm()


def test_the_adapter_is_on_again_behind_the_reference(tmp_path):
    pytest.importorskip("peft")
    trainer = dpo.moved(dpo.made(tmp_path, "model.lora={r: 2}"), 0.2)
    batch = dpo.batch_of(trainer)
    trainer.model.train()
    before, reference, after = trainer.policy(batch), trainer.reference(batch), trainer.policy(batch)
    assert trainer.model.training
    assert torch.equal(before[0], after[0])
    assert (before[0] - reference[0]).abs().max() > 1e-3


def test_adapter_off_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(Exception, match=r"adapter_off needs an adapter\. Set model\.lora"):
        dpo.made(tmp_path, "trainer.reference=adapter_off")


@pytest.mark.parametrize("lora", ["null", "{r: 2}"])
def test_a_reference_has_no_dropout(lora, tmp_path):
    pytest.importorskip("peft")
    off.save_model(tmp_path / "model", attention_dropout=0.5)
    trainer = dpo.made(tmp_path, "model.dropout=true", f"model.lora={lora}")
    trainer.model.train()
    batch = dpo.batch_of(trainer)
    assert torch.equal(trainer.reference(batch)[0], trainer.reference(batch)[0])
    assert not torch.equal(trainer.policy(batch)[0], trainer.policy(batch)[0])


# What is measured


def test_measures_of_two_pairs_by_hand():
    found = of_policy(
        [(-1.0, -4.0), (-6.0, -5.0)], [(-2.0, -2.0), (-3.0, -5.0)], [(0.1, -0.2), (-0.3, 0.0)], [3, 2], [1, 2]
    )
    assert found["pairs/accuracy"] == 0.5
    assert found["pairs/margin"] == pytest.approx((0.3 - 0.3) / 2)
    assert found["likelihood/accuracy"] == 0.5
    assert (found["likelihood/accuracy_low"], found["likelihood/accuracy_high"]) == wilson(0.5, 2)
    assert (found["drift/chosen"], found["drift/rejected"]) == ((1 - 3) / 2, (-2 + 0) / 2)
    assert found["drift/k2"] == (0.5 + 4.5 + 2 + 0) / 4
    assert found["pairs/longer_wins"] == 0.75


def test_what_is_measured_is_what_the_saved_model_says_of_the_held_out_pairs(tmp_path):
    from transformers import AutoModelForCausalLM

    from hf_rlhf.data.offline_rows import read_rows

    given = off.rows("reward_model", count=120)
    for row in given[::5]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    summary = dpo.run(tmp_path, given=given)
    before, after = summary["before"], summary["after"]
    own = load_recipe(tmp_path / "out" / "recipe.yaml")
    _, held_out = read_rows(own.rows, own.trainer())
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("model", "out")]
    ratios = []
    for row in held_out:
        prompt, *sides = pair_of(row, TOKENIZER)
        with torch.no_grad():
            start, end = ([dpo.logps(model, prompt, ids).item() for ids in sides] for model in models)
        ratios.append([x - y for x, y in zip(end, start, strict=True)])
    right = sum(c > r for c, r in ratios) / len(ratios)
    assert 0 < right < 1
    assert after["pairs/accuracy"] == right
    assert (after["pairs/accuracy_low"], after["pairs/accuracy_high"]) == wilson(right, len(ratios))
    assert after["pairs/margin"] == pytest.approx(0.1 * sum(c - r for c, r in ratios) / len(ratios), abs=1e-5)
    assert after["drift/chosen"] == pytest.approx(sum(c for c, _ in ratios) / len(ratios), abs=1e-5)
    assert after["drift/k2"] == pytest.approx(sum(c * c + r * r for c, r in ratios) / 4 / len(ratios), abs=1e-5)
    assert (before["pairs/accuracy"], before["pairs/margin"], before["drift/k2"]) == (0.5, 0, 0)
    assert before["pairs/log_loss"] == pytest.approx(math.log(2))
    assert before["loss"] == pytest.approx(math.log(2))


@pytest.mark.proves("trainer.dpo", how="end to end", tolerance="95 % of held-out pairs")
@pytest.mark.parametrize("name", ["dpo", "cdpo", "fidelity_dpo", "ipo"])
def test_a_policy_learns_to_prefer_what_is_chosen(name, tmp_path):
    words = ["training.max_steps=30", "training.per_device_train_batch_size=16", "model.dtype=float32"]
    summary = dpo.run(tmp_path, *words, "training.learning_rate=0.003", given=off.rows("reward_model", 300), name=name)
    assert summary["after"]["pairs/accuracy_low"] > 0.85
    assert summary["after"]["pairs/accuracy"] > 0.95
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["after"]["drift/chosen"] > summary["after"]["drift/rejected"]


# Runs


SAVES = ("training.save_strategy=steps", "training.save_steps=2")


@pytest.mark.parametrize("words", [("trainer.reference=frozen",), ("trainer.reference=precomputed", "trainer.loss_type=savage"),
                                   ("model.lora={r: 2}",)], ids=str)  # fmt: skip
def test_a_resumed_run_has_equal_bits(words, tmp_path):
    if "lora" in words[0]:
        pytest.importorskip("peft")
    words = (*words, *SAVES, "model.dtype=float32", "training.optim=adamw_torch")
    straight = dpo.run(tmp_path, *words)
    kept = off.weights(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.name != "checkpoint-4":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = dpo.run(tmp_path, *words, resume=True)
    assert off.same(off.weights(tmp_path / "out"), kept)
    assert (resumed["before"], resumed["after"]) == (straight["before"], straight["after"])
    assert [entry["step"] for entry in off.lines(tmp_path / "out") if "loss" in entry] == [5, 6]


def test_a_lora_run_saves_a_whole_model_that_generates(tmp_path):
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    dpo.run(tmp_path, "model.lora={r: 2}")
    assert not list((tmp_path / "out").glob("adapter_*"))
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert model.generate(torch.tensor([[20, 21]]), max_new_tokens=3, do_sample=False).shape[1] > 2
    before, after = off.weights(tmp_path / "model"), off.weights(tmp_path / "out")
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
