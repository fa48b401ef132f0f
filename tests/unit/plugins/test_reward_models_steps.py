"""Process rewards: where steps come from, the token at which a model was trained to be read, and one number for all steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Rollouts, Spans
from hf_rlhf.testing import rollouts
from hf_rlhf_plugins.rewards._models.steps import Step, by_column, by_delimiter, prepared
from hf_rlhf_plugins.rewards.process_reward_model import ProcessRewardModel
from tests.helpers import runs
from tests.helpers.classifiers import (
    TEMPLATE,
    direct,
    logits_of,
    merging_tokenizer,
    save_model,
    save_token_classifier,
    spaced_tokenizer,
)

CPU = torch.device("cpu")


def loaded(folder: str | Path, **settings: Any) -> Any:
    source = load_plugin("rewards", "process_reward_model", model=str(folder), **settings)
    source.load_model(CPU)
    return source


def given(*texts: str, prompt: Any = "say: ", **columns: list[Any]) -> Rollouts:
    made = rollouts([""] * len(texts), prompts=[prompt] * len(texts), columns=columns)
    made.completions = list(texts)
    return made


def chance(folder: str | Path, text: str, *, special: bool = True) -> float:
    """The probability of the second label at the last token of a text, by plain transformers."""
    ids = merging_tokenizer()(text, add_special_tokens=special)["input_ids"]
    return torch.tensor(logits_of(folder, ids)[-1]).softmax(0)[1].item()


def assert_close(found: Spans, expected: list[tuple[int, float]]) -> None:
    assert [end for end, _ in found.values] == [end for end, _ in expected]
    assert [x for _, x in found.values] == pytest.approx([x for _, x in expected], rel=1e-5)


@pytest.fixture
def folder(tmp_path):
    return save_token_classifier(tmp_path, num_labels=2)


# Where steps come from


def test_steps_may_be_places_in_a_column(folder):
    source = loaded(folder, step_column="steps")
    spans, none, empty = source(given("12ab1", "ab", "ab", steps=[[2, 5], None, []]))
    assert_close(spans, [(2, chance(folder, "say: 12")), (5, chance(folder, "say: 12ab1"))])
    assert none is None
    assert empty == Spans([])
    assert source.columns() == {"steps"}
    assert loaded(folder).columns() == set()


def test_steps_may_be_texts_in_a_column(folder):
    source = loaded(folder, step_column="steps")
    (spans,) = source(given("1a\n1a\n2", steps=[["1a", "1a", "2"]]))
    (places,) = source(given("1a\n1a\n2", steps=[[2, 5, 7]]))
    assert spans == places


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([3, 2], "invalid step end 2: expected increasing integers from 1 to the completion's 4 characters"),
        ([5], "invalid step end 5"),
        ([0], "invalid step end 0"),
        ([True], "invalid step end True"),
        (["ab", "12"], "step '12' is not in the completion after character 4"),
        ([""], "step '' is not in the completion"),
        ("12", "steps must be a list of end positions in characters, or of texts, got '12'"),
    ],
)
def test_steps_that_are_none_are_named_with_their_row_and_column(folder, steps, reason):
    source = loaded(folder, step_column="steps")
    with pytest.raises(ValueError, match=r"process_reward_model.step_column='steps', row 1: ") as refused:
        source(given("12", "12ab", steps=[[2], steps]))
    assert reason in str(refused.value)


@dataclass(kw_only=True)
class BySentence(ProcessRewardModel):
    """Steps that end with a full stop and a space."""

    name = "by_sentence"

    def steps(self, rollouts: Rollouts) -> list[list[Step] | None]:
        return [by_delimiter(text, ". ") for text in rollouts.completions]


def test_a_source_may_find_steps_of_its_own(folder):
    source = BySentence(model=folder)
    source.load_model(CPU)
    (spans,) = source(given("12. ab. x"))
    assert [end for end, _ in spans.values] == [4, 8, 9]
    assert_close(Spans(spans.values[:1]), [(4, chance(folder, "say: 12. "))])


@pytest.mark.parametrize("text", ["", "a", "a\n\nb", "\n\n\n\na\n\n", " a \n\n \n\n b ", "\n"])
def test_steps_lie_apart_in_order_and_hold_all_that_is_not_blank(text):
    steps = by_delimiter(text, "\n\n")
    assert all(a.end <= b.start for a, b in itertools.pairwise(steps))
    assert " ".join(text[s.start : s.stop] for s in steps).split() == text.split()
    assert all(text[s.stop : s.end] in ("\n\n", "") for s in steps)
    assert [s.end for s in by_column(text, [s.end for s in steps])] == [s.end for s in steps]


# The token at which a model is read


def test_a_step_token_stands_before_the_delimiter_and_is_read_there(folder):
    """As Math-Shepherd's model has it: the step, the token, the line break."""
    source = loaded(folder, step_token="<step>", delimiter="\n")
    (spans,) = source(given("12\nab\n1"))
    whole = "say: 12<step>\nab<step>\n1<step>"
    ends = [whole.index("<step>", start) + len("<step>") for start in (0, 14, 23)]
    assert_close(spans, [(end, chance(folder, whole[:at])) for end, at in zip([3, 6, 7], ends, strict=True)])


def test_a_step_token_may_stand_in_the_delimiters_place(folder):
    """As Qwen2.5-Math-PRM has it: the steps joined and ended by the token."""
    source = loaded(folder, step_token="<step>", keep_delimiter=False)
    (spans,) = source(given("12\n\nab\n\n"))
    assert_close(spans, [(4, chance(folder, "say: 12<step>")), (8, chance(folder, "say: 12<step>ab<step>"))])
    chat = save_token_classifier(Path(folder) / "chat", num_labels=2, tokenizer=merging_tokenizer(TEMPLATE))
    (spans,) = loaded(chat, step_token="<step>", keep_delimiter=False)(
        given("12\n\nab", prompt=[{"role": "user", "content": "1?"}])
    )
    expected = [chance(chat, f"[u]1?|[a]12<step>{more}", special=False) for more in ("", "ab<step>")]
    assert_close(spans, list(zip([4, 6], expected, strict=True)))


def test_a_step_token_follows_the_steps_of_a_column(folder):
    (spans,) = loaded(folder, step_token="<step>", step_column="steps")(given("12ab1", steps=[[2, 5]]))
    expected = [chance(folder, "say: 12<step>"), chance(folder, "say: 12<step>ab1<step>")]
    assert_close(spans, list(zip([2, 5], expected, strict=True)))


def test_a_causal_model_is_read_as_math_shepherds_is(tmp_path):
    """Two tokens' logits at " ки" after each step, with SentencePiece's spaces."""
    tokenizer = spaced_tokenizer()
    folder = save_model(tmp_path, "AutoModelForCausalLM", tokenizer=tokenizer, pad_token_id=0)
    source = loaded(folder, good_token="+", bad_token="-", step_token=" ки", delimiter="\n")
    (spans,) = source(given("12 ab\nx y", prompt="say "))
    ids = tokenizer("say 12 ab ки\nx y ки")["input_ids"]
    tag, plus, minus = tokenizer.convert_tokens_to_ids(["▁ки", "▁+", "▁-"])
    with torch.no_grad():
        logits = direct("CausalLM", folder)(input_ids=torch.tensor([ids])).logits[0]
    places = [i for i, token in enumerate(ids) if token == tag]
    assert_close(
        spans, [(end, logits[i][[plus, minus]].softmax(0)[0].item()) for end, i in zip([6, 9], places, strict=True)]
    )


def test_a_step_token_that_the_completion_writes_earns_nothing(folder):
    source = loaded(folder, step_token="<step>")
    honest, written = source(given("12\n\nab", "12\n\n<step><step>ab"))
    assert len(honest.values) == len(written.values) == 2


def test_a_step_token_that_the_tokenizer_does_not_have_is_named(tmp_path, folder):
    with pytest.raises(
        ValueError, match=rf"step_token: '<extra_0>' must be a single token of the tokenizer of '{folder}'"
    ):
        loaded(folder, step_token="<extra_0>")
    refused = (
        ({"keep_delimiter": False}, "keep_delimiter needs step_token and delimiter"),
        ({"bad_token": "-"}, "bad_token needs good_token. Set good_token"),
        ({"reduce": "product", "value": "logit"}, "reduce=product needs probabilities. Set value: probability"),
    )
    for settings, reason in refused:
        source = {"use": "process_reward_model", "model": "nowhere", **settings}
        (problem,) = runs.recipe(rewards=[source]).algorithm().problems()
        assert reason in problem


def test_a_step_token_that_merges_with_the_text_gives_no_score(tmp_path, caplog):
    """`ab` is a token, but the text around makes `1` and `2` of `12`, and of the step token `2` a part of it."""
    folder = save_token_classifier(tmp_path)
    source = loaded(folder, step_token="2", delimiter="\n")
    plain, merged, cut = source(given("x\ny", "1\ny", "x"))
    assert len(plain.values) == 2
    assert len(cut.values) == 1
    assert [end for end, _ in merged.values] == [2, 3], "`12` ends where the step token ends"
    source = loaded(folder, step_token="1", delimiter="2")
    assert source(given("x2y")) == [None]
    assert "merges step_token with a completion's text; it has no score" in caplog.text


def test_the_text_for_the_model_is_the_completion_with_what_is_put_in():
    text = "a;b;c"
    steps = by_delimiter(text, ";")
    assert prepared(text, steps, ";", None, True) == ("a;b;c;", [(0, 2), (2, 4), (4, 6)])
    assert prepared(text, steps, ";", "!", True) == ("a!;b!;c!", [(1, 2), (4, 5), (7, 8)])
    assert prepared(text, steps, ";", "!", False) == ("a!b!c!", [(1, 2), (3, 4), (5, 6)])
    assert prepared(text, by_column(text, [1, 3]), "", None, True) == (text, [(0, 1), (1, 3)])
    assert prepared("", [], ";", "!", True) == ("", [])


# One number for all steps


@pytest.mark.parametrize(
    ("how", "of"),
    [
        ("sum", sum),
        ("mean", lambda x: sum(x) / len(x)),
        ("min", min),
        ("last", lambda x: x[-1]),
        ("product", math.prod),
    ],
)
@pytest.mark.proves("rewards.process_reward_model", how="closed form", tolerance="rtol 1e-6")
def test_steps_reduce_to_one_number(folder, how, of):
    texts = ["12\n\nab\n\nx", "ab", "12\n\n"]
    by_step = loaded(folder)(given(*texts))
    numbers = loaded(folder, reduce=how)(given(*texts))
    assert numbers == pytest.approx([of([x for _, x in spans.values]) for spans in by_step], rel=1e-6)


@pytest.mark.parametrize("how", ["mean", "min", "last", "product", "sum"])
def test_without_a_step_only_the_sum_is_a_number(folder, how):
    assert loaded(folder, reduce=how)(given("", "\n\n")) == [0.0 if how == "sum" else None] * 2


def test_one_number_stands_at_the_last_token_of_the_policy(tmp_path):
    folder = save_token_classifier(tmp_path / "model", num_labels=2)
    data = [{"prompt": "ab", "completions": ["12\n\nab", "1", "ab\n\n12", "12"]}] * 4
    source = {"use": "process_reward_model", "model": folder, "reduce": "min"}
    made = runs.trainer(tmp_path, data=data, rewards=[source], advantages={"use": "reward_to_go", "gamma": 1.0})
    try:
        buffer = made.collector.collect(0)
        for row, ids in enumerate(buffer.completion_ids):
            text = made.collector.policy.tokenizer.decode(ids, skip_special_tokens=True)
            (score,) = made.algorithm.rewards[0](given(text, prompt="ab"))
            assert buffer.rows["advantages"][row, : len(ids)].tolist() == pytest.approx([score] * len(ids), abs=1e-5)
    finally:
        made.close()
