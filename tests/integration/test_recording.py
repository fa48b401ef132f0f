"""Rows that a run keeps: recorded groups of rollouts, every held-out row, and with `logging.completions=all` every row."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hf_rlhf.data.token_text import pieces_of
from hf_rlhf.training.recording import GROUPS, ROLLOUTS, quantized, recorded
from tests.helpers import runs
from tests.helpers.models import byte_tokenizer

FILTERED: dict[str, Any] = {
    "filters": ["zero_variance", {"use": "too_short", "min_tokens": 3}],
    "rollout": runs.SAMPLED,
    "reference": "frozen",
    "kl": ["monitor"],
}
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}


def files(folder: Path) -> dict[str, Any]:
    """The kept rows of a run, by file."""
    found: dict[str, Any] = {}
    for path in sorted(path for kind in ("rollouts", "evaluation", "completions") for path in folder.glob(f"{kind}/*")):
        name = f"{path.parent.name}/{path.name}"
        found[name] = json.loads(path.read_text()) if path.suffix == ".json" else pq.read_table(path).to_pylist()
    return found


def rows_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for group in sample["groups"] for row in group["rows"]]


def numbers(quantised: dict[str, Any]) -> np.ndarray:
    q = np.frombuffer(base64.b64decode(quantised["data"]), dtype=np.int8)
    return np.where(q == -128, np.nan, q * quantised["scale"] / 127)


# Which rollouts


@pytest.mark.parametrize("rollouts", [*range(1, 40), 160, 1000, 123_456])
def test_the_recorded_rollouts_are_the_first_the_last_and_log_spaced(rollouts):
    found = recorded(rollouts)
    assert len(found) == min(ROLLOUTS, rollouts)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, rollouts - 1)
    if rollouts >= 1000:
        ratios = [b / a for a, b in itertools.pairwise(found[8:])]
        assert max(ratios) / min(ratios) < 1.2


# Numbers and text of tokens


def test_numbers_keep_eight_bits():
    values = [0.0, -3.25, 1.5, float("nan"), 2e-3, float("inf")]
    found = numbers(quantized(values))
    assert np.isnan(found[[3, 5]]).all()
    assert np.abs(found[[0, 1, 2, 4]] - np.array(values)[[0, 1, 2, 4]]).max() <= 3.25 / 127 / 2 + 1e-12
    assert (numbers(quantized([0.0, 0.0])) == 0).all()
    assert numbers(quantized([])).size == 0


@pytest.mark.parametrize("text", ["plain words", "Grüezi 🦙 中文", " leads and  trails \n", "", "half \ud83e"])
def test_pieces_are_the_text_and_a_character_of_several_tokens_is_whole(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text.encode("utf-8", "replace").decode())["input_ids"]
    (pieces,) = pieces_of(tokenizer, [ids])
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "\ufffd" not in "".join(pieces)


def test_pieces_of_a_sentencepiece_tokenizer_keep_their_spaces(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁the", "▁cat", "s", "▁", "▁sat"]
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    own.decoder = tokenizers.decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    (pieces,) = pieces_of(tokenizer, [[1, 2, 3, 5]])
    assert pieces == ["the", " cat", "s", " sat"]


# A run


def test_a_recorded_row_has_its_text_rewards_numbers_and_what_dropped_it(tmp_path):
    runs.trained(tmp_path, data=runs.problems(40), training={"max_steps": 8}, update={}, **FILTERED)
    samples = [content for name, content in files(tmp_path).items() if name.startswith("rollouts/")]
    assert [sample["step"] for sample in samples] == list(range(8))
    rows = [row for sample in samples for row in rows_of(sample)]
    assert {len(group["rows"]) for sample in samples for group in sample["groups"]} == {4}
    assert {len(sample["groups"]) for sample in samples} == {GROUPS}
    why = {row["dropped"] for row in rows}
    assert None in why
    assert why - {None} <= {"filter zero_variance", "filter too_short"}
    assert why - {None}
    for row in rows:
        assert set(row["rewards"]) == {"early"}
        assert row["total"] == row["rewards"]["early"]
        if row["dropped"] is None:
            assert numbers(row["logp"]).shape == numbers(row["kl"]).shape == (len(row["pieces"]),)
            assert (numbers(row["logp"]) <= 0).all()
            assert len(set(numbers(row["advantage"]))) == 1  # of the group, at every token
        else:
            assert "advantage" not in row
    first = [row for row in rows_of(samples[0]) if row["dropped"] is None]
    assert all(np.abs(numbers(row["kl"])).max() < 1e-5 for row in first)  # the policy is the reference
    last = [row for row in rows_of(samples[-1]) if row["dropped"] is None]
    assert any(np.abs(numbers(row["kl"])).max() > 1e-3 for row in last)


@pytest.mark.parametrize("completions", [8, "all"])
def test_the_table_of_completions_shows_conversations_by_their_masks(completions, tmp_path):
    made = runs.trained(
        tmp_path,
        rollout={**runs.SAMPLED, "max_new_tokens": 3},
        environment=[{"use": "second_chance", "max_tokens": 32, "says": "no {prompt}"}],
        rewards=["episode"],
        logging={"completions": completions},
    )
    tables = [pq.read_table(file).to_pylist() for file in sorted((tmp_path / "completions").glob("*.parquet"))]
    rows = [row for table in tables for row in table]
    assert len(rows) >= 8
    several = 0
    for row in rows:
        spans = json.loads(row["conversation"])
        own = [span["text"] for span in spans if span["mask"]]
        others = [span["text"] for span in spans if not span["mask"]]
        assert [span["mask"] for span in spans] == [1, 0] * len(others) + [1] * (len(own) - len(others))
        assert others in ([], [f"no {row['prompt']}"])
        ids = made.processing_class("".join(own), add_special_tokens=False)["input_ids"]
        assert len(ids) == row["tokens"]
        several += len(own) > 1
    assert several


@pytest.mark.parametrize(
    "update", [{}, {"mini_batches": 2}, {"mini_batches": 2, "epochs": 2}], ids=["one", "two", "four"]
)
@pytest.mark.parametrize("loss", ["ppo_clip", "reinforce"])
def test_log_probs_are_those_of_the_policy_that_sampled(loss, update, tmp_path):
    parts = {**FILTERED, "filters": [], "policy_loss": loss, "update": update}
    made = runs.trainer(tmp_path, training={"max_steps": 4}, **parts)
    start = made.model.lm_head.weight.detach().clone()
    seen: list[dict[str, Any]] = []
    collect = made.collector.collect

    def collected(index: int) -> Any:
        buffer = collect(index)
        if index == 0:
            assert torch.equal(made.model.lm_head.weight, start)
            with torch.no_grad():
                for prompt, ids in zip(buffer.prompt_ids, buffer.completion_ids, strict=True):
                    logits = made.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                    seen.append(
                        {"ids": ids, "logps": logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]}
                    )
        return buffer

    made.collector.collect = collected  # type: ignore[method-assign]
    made.train()
    made.close()
    rows = rows_of(files(tmp_path)["rollouts/step_000001.json"])
    known = [row for row in rows if "logp" in row]
    assert len(known) >= len(rows) // update.get("mini_batches", 1)
    for row in known:
        values = numbers(row["logp"])
        same = [x["logps"].numpy() for x in seen if len(x["ids"]) == len(values)]
        assert min(np.abs(values - x).max() for x in same) <= row["logp"]["scale"] / 254 + 1e-4


@pytest.mark.parametrize("update", [{}, {"mini_batches": 2}], ids=["one", "two"])
@pytest.mark.parametrize("completions", [16, "all"])
def test_a_resumed_run_keeps_the_rows_of_the_undisturbed_one(completions, update, tmp_path):
    parts = {**FILTERED, "update": update, "logging": {"completions": completions}}
    data, held_out = runs.problems(40), runs.problems(5, seed=1)

    def trainer(folder: Path) -> Any:
        return runs.trainer(folder, data=data, eval_data=held_out, training=SAVING, **parts)

    made = trainer(tmp_path)
    made.evaluate()
    made.train()
    made.close()
    whole = files(tmp_path)
    assert sum(name.startswith("evaluation/") for name in whole) == 4
    for step in (1, 4):
        (tmp_path / "rollouts" / "step_000099.json").write_text("{}")
        again = trainer(tmp_path)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        again.close()
        assert files(tmp_path) == whole


def test_what_is_recorded_changes_no_weight(tmp_path):
    weights = []
    for completions in (0, 16, "all"):
        folder = tmp_path / str(completions)
        made = runs.trained(folder, data=runs.problems(40), logging={"completions": completions}, **FILTERED)
        weights.append({name: x.clone() for name, x in made.model.state_dict().items()})
        assert (folder / "rollouts").exists() == (completions != 0)
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in weights[0])


def test_all_completions_are_every_row_of_every_rollout_and_say_what_dropped_them(tmp_path):
    training = {"max_steps": 4, "logging_steps": 4}
    made = runs.trained(
        tmp_path, data=runs.problems(40), update={}, training=training, logging={"completions": "all"}, **FILTERED
    )
    tables = [content for name, content in files(tmp_path).items() if name.startswith("completions/")]
    assert len(tables) == 4  # one for each rollout, where the log has one entry
    drawn = [sum(1 for _ in rows) for rows in tables]
    assert all(count >= 16 for count in drawn)
    for rows in tables:
        assert {row["dropped"] for row in rows} <= {
            None,
            "filter zero_variance",
            "filter too_short",
            "more groups than needed",
        }
        for row in rows:
            assert row["reward/total"] == row["reward/early"]
            if row["dropped"] is None:
                assert row["advantage"] is not None
    assert any(row["dropped"] for rows in tables for row in rows)
    assert len(made.run_log.completions) == 0


# Evaluation


def test_an_evaluation_keeps_every_row_in_order(tmp_path):
    held_out = runs.problems(9, seed=1)
    made = runs.trainer(
        tmp_path, eval_data=held_out, evaluation={"num_generations": 2}, rewards=[runs.FORMAT, "exact_match"]
    )
    metrics = made.evaluate()
    made.evaluate(runs.problems(3, seed=2))  # not the run's own
    rows = files(tmp_path)["evaluation/step_000000.parquet"]
    assert [row["prompt"] for row in rows] == [each["prompt"] for each in held_out for _ in range(2)]
    assert [row["reference"] for row in rows] == [each["answer"] for each in held_out for _ in range(2)]
    assert np.mean([row["reward/early"] for row in rows]) == pytest.approx(metrics["eval_reward/early/mean"])
    assert np.mean([row["tokens"] for row in rows]) == pytest.approx(metrics["eval_rollout/length/mean"])
    assert list((tmp_path / "evaluation").iterdir()) == [tmp_path / "evaluation" / "step_000000.parquet"]
    made.close()


def test_each_of_several_evaluation_datasets_has_a_file(tmp_path):
    made = runs.trainer(tmp_path, eval_data={"one": runs.problems(3, seed=1), "two": runs.problems(2, seed=2)})
    made.evaluate()
    made.close()
    assert {name: len(rows) for name, rows in files(tmp_path).items()} == {
        "evaluation/step_000000_one.parquet": 3,
        "evaluation/step_000000_two.parquet": 2,
    }


def test_a_disk_that_takes_no_rows_is_a_warning(tmp_path, caplog):
    tmp_path.joinpath("evaluation").write_text("a file where the folder should be")
    made = runs.trainer(tmp_path, eval_data=runs.problems(3, seed=1))
    assert "eval_reward/early/mean" in made.evaluate()
    made.close()
    assert sum("held-out rows are not kept" in message for message in caplog.messages) == 1
