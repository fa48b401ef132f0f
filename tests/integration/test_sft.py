"""`trainer.sft`: which tokens are learned, the loss by hand, packing, what is measured, what is saved, exact resume."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_rlhf import load_plugin
from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.config.sections import Dataset
from hf_rlhf.data.prompts import load_prompts
from hf_rlhf.data.sources import DatasetError
from hf_rlhf.testing import conformance
from hf_rlhf.training.offline.setup import make_trainer
from tests.helpers import offline_runs as off
from tests.helpers import sft_runs as sft
from tests.helpers.models import CHAT_TEMPLATE, byte_tokenizer

MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if loop.last %}LAST:{% endif %}{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def encoded(row: dict[str, Any], template: str | None = None, **settings: Any) -> tuple[str, str]:
    """All tokens of a row and the learned ones, as text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    made = load_plugin("trainer", "sft", **settings).encode(row, tokenizer)
    kept = [token for token, label in zip(made["input_ids"], made["labels"], strict=True) if label != -100]
    assert all(label in (-100, token) for token, label in zip(made["input_ids"], made["labels"], strict=True))
    return tokenizer.decode(made["input_ids"]), tokenizer.decode(kept)


# Which tokens are learned


def test_of_a_prompt_with_its_completion_the_completion_and_its_end_are_learned():
    row = {"prompt": "1+1=", "completion": "2"}
    assert encoded(row) == ("1+1=2<eos>", "2<eos>")
    assert encoded(row, completion_only_loss=False) == ("1+1=2<eos>", "1+1=2<eos>")
    assert encoded({"prompt": "1+1=", "completion": "2<eos>"}) == ("1+1=2<eos>", "2<eos>")


def test_a_prompt_has_the_tokens_that_a_rollout_gives_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for prompt, answer in (("1+1=", "2"), (sft.conversation("hi", "yes?", "how?"), sft.conversation("", "so")[1:])):
        made = load_plugin("trainer", "sft").encode({"prompt": prompt, "completion": answer}, tokenizer)
        prompts, _ = load_prompts(Dataset(held_out=0), tokenizer, train=[{"prompt": prompt}])
        ids = next(iter(prompts)).ids
        assert made["input_ids"][: len(ids)] == ids
        assert made["labels"][: len(ids)] == [-100] * len(ids)
        assert -100 not in made["labels"][len(ids) :]


def test_of_a_conversation_every_turn_of_the_assistant_is_learned():
    row = {"messages": sft.conversation("a", "b", "c", "d")}
    whole, learned = encoded(row, CHAT_TEMPLATE, format="messages")
    assert whole == "<|user|>a\n<|assistant|>b\n<eos><|user|>c\n<|assistant|>d\n<eos>"
    assert learned == "b\n<eos>d\n<eos>"
    assert encoded(row, CHAT_TEMPLATE, format="messages", completion_only_loss=False)[1] == whole


def test_a_templates_own_end_of_a_turn_is_taken_and_what_stands_behind_it_is_not_learned():
    template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    row = {"messages": sft.conversation("a", "b", "c", "d")}
    for chosen in (template, MARKED):
        whole, learned = encoded(row, chosen, format="messages")
        assert whole == "<|user|>a\n<|assistant|>b<eos>\n<|user|>c\n<|assistant|>d<eos>\n"
        assert learned == "b<eos>d<eos>"
    pair = {"prompt": sft.conversation("a"), "completion": "b"}
    assert encoded(pair, template) == ("<|user|>a\n<|assistant|>b<eos>", "b<eos>")


def test_an_end_behind_a_marked_turn_is_learned():
    outside = MARKED.replace(" + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ eos_token }}")
    assert encoded({"messages": sft.conversation("a", "b")}, outside, format="messages")[1] == "b<eos>"


def test_a_template_that_rewrites_earlier_turns_is_refused_and_marks_settle_it():
    row = {"messages": sft.conversation("a", "b", "c", "d")}
    with pytest.raises(ValueError, match=r"does not mark the assistant's\. Set model\.chat_template"):
        encoded(row, FORGETFUL, format="messages")
    marked = FORGETFUL.replace("{{ message['content'] }}{{ eos_token }}", "{% generation %}{{ message['content'] }}"
                               "{{ eos_token }}{% endgeneration %}")  # fmt: skip
    assert "LAST:d" in encoded(row, marked, format="messages")[0]


def test_a_text_is_learned_whole():
    assert encoded({"text": "one two"}, format="text") == ("one two<eos>", "one two<eos>")


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("prompt_completion", {"completion": None}, "completion must be a text, like prompt, got None"),
        ("text", {"text": None}, "text must be a string, got None"),
        (
            "messages",
            {"messages": None},
            "messages must be a text or a list of messages with role and content, got None",
        ),
        ("messages", {"messages": sft.conversation("a")}, "must have an assistant turn"),
    ],
)
def test_a_wrong_row_is_named_with_its_number(format, change, message, tmp_path):
    given = [{**row, **(change if i == 4 else {})} for i, row in enumerate(sft.MIXED)]
    with pytest.raises(DatasetError, match=rf"row 5 \(the first is 1\): .*{message}"):
        sft.made(tmp_path, "dataset.held_out=0", f"trainer.format={format}", given=given)


def test_the_columns_are_those_of_the_format(tmp_path):
    assert [sorted(load_plugin("trainer", "sft", format=name).columns()) for name in
            ("prompt_completion", "messages", "text")] == [["completion", "prompt"], ["messages"], ["text"]]  # fmt: skip
    with pytest.raises(DatasetError, match=r"trainer=sft reads messages; the dataset has no 'messages'"):
        sft.made(tmp_path, "trainer.format=messages")


# The loss


def by_hand(model: Any, examples: Any) -> tuple[torch.Tensor, int, int]:
    """The sum of -log p of the labelled tokens, each row alone; how many are the likeliest; how many there are."""
    loss, right, count = torch.zeros((), dtype=torch.float64), 0, 0
    for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for place, label in enumerate(labels):
            if place and label != -100:
                loss = loss - (logits[place - 1, label] - logits[place - 1].logsumexp(0))
                right += int(logits[place - 1].argmax() == label)
                count += 1
    return loss, right, count


@pytest.mark.proves("trainer.sft", how="closed form", tolerance="1e-6")
@pytest.mark.parametrize("words", [[], ["trainer.completion_only_loss=false"], ["trainer.packing=true"]])
def test_a_step_is_the_gradient_of_the_mean_over_the_learned_tokens(words, tmp_path):
    """Two micro-batches of unequal length, plain gradient descent."""
    given = sft.rows(8)
    step = ["training.max_steps=1", "training.optim=sgd", "training.learning_rate=0.1", "training.max_grad_norm=0"]
    step += ["training.lr_scheduler_type=constant", "dataset.held_out=0", "trainer.max_length=40"]
    batches = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2"]
    trainer = sft.made(tmp_path, *step, *batches, *words, given=given)
    unpacked = [word for word in words if "packing" not in word]
    examples = sft.made(tmp_path, *step, *unpacked, given=given).train_dataset
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    total, _, count = by_hand(model, examples)
    (total / count).backward()
    wanted = torch.cat([-0.1 * p.grad.flatten() for p in model.parameters()])
    trainer.train()
    moved = torch.cat([(p - q).flatten() for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True)])
    assert (moved - wanted).norm() <= 1e-6 * wanted.norm(), "TRL takes log-probs in float32"
    if "trainer.packing=true" in words:
        assert len(trainer.train_dataset) < len(examples) == 8


def test_what_is_measured_weighs_every_token_alike(tmp_path):
    trainer = sft.made(tmp_path, "dataset.held_out=2", "training.per_device_eval_batch_size=3")
    assert len(trainer.eval_dataset) == 2
    with torch.no_grad():
        loss, right, count = by_hand(trainer.model.eval(), trainer.eval_dataset)
        found = trainer.plugin.measure(trainer, trainer.eval_dataset)
    assert found["tokens/log_loss"] == pytest.approx(float(loss) / count, rel=1e-9)
    assert found["tokens/perplexity"] == pytest.approx(math.exp(float(loss) / count), rel=1e-9)
    assert (found["tokens/accuracy"], found["tokens/count"]) == (right / count, count)


def test_the_model_of_a_row_does_not_see_the_others_in_its_sequence(tmp_path):
    """What is checked before packing: it holds for a Llama, and not where positions do not say which row a token is of."""
    trainer = sft.made(tmp_path, "trainer.packing=true")
    assert set(trainer.train_dataset.column_names) == {"input_ids", "labels", "seq_lengths"}
    assert max(map(sum, trainer.train_dataset["seq_lengths"])) <= 256
    from hf_rlhf_plugins.trainer._sft_measures import check_packing

    forward = trainer.model.forward

    def without_positions(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{name: x for name, x in kwargs.items() if name in ("input_ids", "use_cache")})

    trainer.model.forward = without_positions
    with pytest.raises(ValueError, match="rows in one sequence change each other's logits"):
        check_packing(trainer, [[1, 2, 3], [4, 5, 6]])


# Runs


@pytest.mark.proves("trainer.sft", how="end to end", tolerance="exact")
def test_what_is_saved_is_a_policy_that_has_learned_and_stops(tmp_path):
    """It answers as it was taught, through the rollout of another recipe."""
    given = [{"prompt": f"{i}=", "completion": "ab"} for i in range(24)]
    words = ["training.max_steps=25", "training.learning_rate=0.02", "model.dtype=float32"]
    summary = sft.run(tmp_path, *words, given=given)
    assert summary["after"]["tokens/accuracy"] == 1.0
    assert summary["after"]["tokens/perplexity"] < 1.2 < summary["before"]["tokens/perplexity"]
    prompts = off.write(tmp_path / "prompts.jsonl", [{"prompt": f"{i}=", "answer": "ab"} for i in range(20)])
    small = [f"model.path={tmp_path / 'out'}", f"dataset.path={prompts}", "training.max_steps=1"]
    small += ["evaluation.temperature=0", "rollout.prompts=2", "rollout.num_generations=2", "training.use_cpu=true"]
    small += ["training.learning_rate=0"]
    again = train(load_recipe("quickstart", small), str(tmp_path / "rl"))
    assert again["before"]["accuracy"] == 1.0
    assert again["before"]["rollout/truncated_frac"] == 0.0


def test_a_resumed_run_has_equal_bits(tmp_path):
    words = ("training.save_strategy=steps", "training.save_steps=2", "model.dtype=float32", "trainer.packing=true")
    words += ("trainer.max_length=30",)
    straight = sft.run(tmp_path, *words)
    kept = off.weights(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.name != "checkpoint-4":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = sft.run(tmp_path, *words, resume=True)
    assert off.same(off.weights(tmp_path / "out"), kept)
    assert (resumed["before"], resumed["after"]) == (straight["before"], straight["after"])


def test_it_keeps_what_every_trainer_promises():
    facts = conformance(load_plugin("trainer", "sft", format="text"), rows=sft.MIXED[:8])
    assert len(facts) >= 6
    for fact in facts:
        fact()


def test_it_has_rows_of_the_quickstarts_task(tmp_path):
    chosen, out = load_recipe("sft"), str(tmp_path / "out")
    trainer = make_trainer(chosen, out)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (7588, 512)
    with torch.no_grad():
        found = trainer.plugin.measure(trainer, trainer.eval_dataset.select(range(64)))
    assert 1.2 < found["tokens/perplexity"] < 1.6
