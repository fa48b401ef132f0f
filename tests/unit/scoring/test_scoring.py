"""Whatever a reward source does, its numbers are checked and nothing outside it changes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.cli import errors
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.scoring.lookup import named_rewards
from hf_rlhf.scoring.scorer import RewardError, Scorer, total
from hf_rlhf.testing import rollouts, tiny_policy
from tests.helpers import runs
from tests.helpers.flaky_rewards import score


@dataclass(kw_only=True)
class Answers(RewardSource):
    """What it was told to answer, or what a function of the rollouts gives."""

    name: ClassVar[str] = "answers"

    what: Any = field(default=None)
    """The answer, or a function."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return self.what(rollouts) if callable(self.what) else self.what


def scores_of(what: Any, label: str = "mine") -> list[float]:
    return score([(label, Answers(what=what))], rollouts())[label].tolist()


def refusal(what: Any) -> str:
    with pytest.raises(RewardError) as refused:
        scores_of(what)
    assert "'mine'" in str(refused.value)
    return str(refused.value)


def same(found: list[float], want: list[float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, want, strict=True))


# What counts as numbers


@pytest.mark.parametrize(
    "answer",
    [
        [1, 0.5, 0, -2],
        (1, 0.5, 0, -2),
        np.array([1, 0.5, 0, -2]),
        np.array([1, 0.5, 0, -2], dtype=object),
        torch.tensor([1, 0.5, 0, -2]),
        torch.tensor([1, 0.5, 0, -2], dtype=torch.bfloat16),
        torch.tensor([1, 0.5, 0, -2], requires_grad=True),
        [torch.tensor(1), np.float32(0.5), np.int64(0), -2],
        [True, 0.5, False, -2],
    ],
    ids=["list", "tuple", "numpy", "objects", "torch", "bfloat16", "with gradient", "mixed", "bool"],
)
def test_one_number_per_row_in_any_of_the_usual_forms(answer):
    found = score([("mine", Answers(what=answer))], rollouts())["mine"]
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert found.tolist() == [1, 0.5, 0, -2]


def test_none_means_that_a_source_does_not_apply(caplog):
    assert same(scores_of([1, None, 0, None]), [1, math.nan, 0, math.nan])
    assert not caplog.records


@pytest.mark.parametrize("invalid", [math.nan, np.float32("nan"), torch.tensor(math.nan), math.inf, -math.inf])
def test_numbers_that_are_not_finite_count_as_missing_with_a_warning(invalid, caplog):
    assert same(scores_of([1, invalid, None, invalid]), [1, math.nan, math.nan, math.nan])
    assert "'mine' (Answers) returned NaN or an infinite number, rows 1, 3: they count as missing" in caplog.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "one number per completion (4), got 2"),
        ([1.0] * 5, "one number per completion (4), got 5"),
        (torch.ones(3), "one number per completion (4), got 3"),
        ([], "one number per completion (4), got 0"),
        (1.0, "a list with one number or None per row, got a float"),
        (None, "got a NoneType"),
        (True, "got a bool"),
        (np.array(1.0), "got shape ()"),
        (torch.tensor(1.0), "got shape ()"),
        ({0: 1.0}, "got a dict"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "got a dict"),
        ("1234", "got a str"),
        ({1.0, 2.0, 3.0, 4.0}, "got a set"),
        ((x for x in (1.0, 2.0, 3.0, 4.0)), "got a generator"),
        (np.ones((4, 1)), "got shape (4, 1)"),
        (torch.ones(4, 8), "got shape (4, 8)"),
        ([[1.0], [2.0], [3.0], [4.0]], "row 0: ... got [1.0]"),
        ([1.0, "0.5", 1.0, 1.0], "row 1: ... got '0.5'"),
        ([1.0, 1.0, {"score": 1}, 1.0], "row 2: ... got {'score': 1}"),
        ([1.0, 1.0, 1.0, 1j], "row 3: ... got 1j"),
        ([10**400, 1.0, 1.0, 1.0], "row 0: ... got 1000"),
    ],
    ids=lambda x: str(x)[:30] if isinstance(x, str) else type(x).__name__,
)
def test_anything_else_is_refused_by_name(answer, message):
    said = refusal(answer)
    assert all(part in said for part in message.split("... "))


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyError("x"), ZeroDivisionError(), StopIteration(), AssertionError()]
)
def test_an_exception_names_the_source_and_keeps_its_cause(error):
    def fails(rollouts):
        raise error

    assert f"reward 'mine' (Answers) raised {type(error).__name__}" in refusal(fails)
    with pytest.raises(RewardError) as refused:
        scores_of(fails)
    assert refused.value.__cause__ is error


def test_an_interrupt_is_not_caught():
    def interrupted(rollouts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores_of(interrupted)


# What a source can do to others


def vandal(rollouts: Rollouts) -> list[float]:
    rollouts.completions[0] = "changed"
    rollouts.completion_ids[0].append(99)
    rollouts.masks[0].clear()
    rollouts.prompts[0][0]["content"] = "changed"
    rollouts.columns["facts"][0]["deep"].append("changed")
    rollouts.columns["new"] = []
    rollouts.group_ids.reverse()
    rollouts.finish_reasons.clear()
    return [0.0] * 4


def test_a_source_cannot_change_what_the_next_one_sees_however_deep_it_reaches():
    given = rollouts(
        prompts=[[{"role": "user", "content": "hi"}] for _ in range(4)],
        columns={"answer": ["5"] * 4, "facts": [{"deep": [i]} for i in range(4)]},
    )
    seen = {}

    def next_one(rollouts):
        seen.update(vars(rollouts))
        return [1.0] * 4

    score([("vandal", Answers(what=vandal)), ("next", Answers(what=next_one))], given)
    expected = rollouts(
        prompts=[[{"role": "user", "content": "hi"}] for _ in range(4)],
        columns={"answer": ["5"] * 4, "facts": [{"deep": [i]} for i in range(4)]},
    )
    assert vars(given) == vars(expected) == seen


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


WILD: dict[str, Callable[[], Any]] = {
    "python's": lambda: random.random(),
    "numpy's": lambda: np.random.rand(),
    "torch's": lambda: torch.rand(3),
    "python's seed": lambda: random.seed(1),
    "numpy's seed": lambda: np.random.seed(1),
    "torch's seed": lambda: torch.manual_seed(1),
    "the gradient mode": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
}


@pytest.mark.parametrize("what", WILD)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_generators_modes_and_dtype_are_put_back(what, fails):
    def wild(rollouts):
        WILD[what]()
        if fails:
            raise ValueError
        return [0.0] * 4

    before = states(), torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        with seeded(0, "reward", 0, 0):
            scores_of(wild)
    except RewardError:
        assert fails
    assert (states(), torch.is_grad_enabled(), torch.get_default_dtype()) == before


def test_a_source_draws_the_same_numbers_wherever_the_run_stands():
    drawn = []
    for _ in range(2):
        random.random(), np.random.rand(), torch.rand(1)
        with seeded(0, "reward", 3, 0):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    with seeded(0, "reward", 4, 0):
        assert random.random() != drawn[0][0]


WILD_FILE = """
import random, numpy, torch
def calm(completions):
    return [float(len(text)) for text in completions]
def wild(completions):
    random.random(), numpy.random.rand(), torch.rand(5), torch.manual_seed(3), random.seed(4)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    return calm(completions)
"""


def test_a_wild_source_trains_as_a_calm_one_does(tmp_path):
    """Sampled completions, of the next rollouts too, do not move with what a reward draws."""
    (tmp_path / "source.py").write_text(WILD_FILE)

    def run(name):
        source = {"use": "function", "function": f"{tmp_path}/source.py:{name}", "label": "x"}
        made = runs.trained(tmp_path, rewards=[runs.FORMAT, source], rollout=runs.SAMPLED, training={"max_steps": 4})
        return runs.parameters(made)

    assert torch.equal(run("calm"), run("wild"))
    assert torch.get_default_dtype() == torch.float32


def test_the_label_of_a_failing_source_reaches_the_user(tmp_path):
    (tmp_path / "source.py").write_text("def broken(completions):\n    return [1 / 0]\n")
    source = {"use": "function", "function": f"{tmp_path}/source.py:broken", "label": "house style"}
    made = runs.trainer(tmp_path, rewards=[source])
    with pytest.raises(RewardError, match=r"(?s)'house style'.*broken.*division by zero"):
        made.train()


class Broken(Answers):
    """Fails for three rows of four, or as `what` says."""

    name: ClassVar[str] = "broken"
    rowwise: ClassVar[bool] = True

    def __call__(self, rollouts: Rollouts) -> Any:
        if self.what != "some" or rollouts.completions[0] != "a":
            try:
                raise ZeroDivisionError
            except ZeroDivisionError as error:
                raise ValueError(f"no score for {rollouts.completions[0]}") from error
        return [1.0]


@pytest.mark.parametrize("workers", ["inline", "threads"])
@pytest.mark.parametrize(
    ("what", "on_error", "calls"), [("all", "raise", 1), ("all", "none", 1), ("some", "none", 3), ("all", 0.0, 1)]
)
def test_a_failing_reward_ends_with_one_traceback_and_code_1(what, on_error, calls, workers, caplog, capsys):
    batch = rollouts(["a", "b", "c", "d"] * 3)
    with Scorer([("mine", Broken(what=what, on_error=on_error, workers=workers))]) as scorer:
        for _ in range(calls - 1):
            scorer.ask(batch, 0)
        with pytest.raises(RewardError) as ended:
            scorer.ask(batch, 0)
    assert errors.report(ended.value) == 1
    printed = caplog.text + capsys.readouterr().err
    assert printed.count("Traceback (most recent call last)") == 1
    assert "raise ZeroDivisionError" in printed
    assert "error: reward 'mine' (Broken) raised ValueError: no score for" in printed


def test_a_file_with_rewards_alone_is_read_with_overrides(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("rewards:\n- {use: exact_match, column: truth}\n- {use: format, label: shape}\n")
    found = named_rewards(str(file), ["rewards.0.column=a: b", "dataset.prompt=question"])
    assert [label for label, _ in found.sources] == ["exact_match", "shape"]
    assert found.columns() == {"a: b"}
    assert found.dataset.prompt == "question"
    file.write_text("rewards: [{use: exact_match, colum: x}]\nevaluation: {}\ndatasett: {}")
    with pytest.raises(UserError) as refused:
        named_rewards(str(file))
    assert "rewards.0.colum: rewards.0=exact_match has no such setting. Did you mean 'column'?" in str(refused.value)
    assert "datasett: a file of rewards has no such key. Did you mean 'dataset'?" in str(refused.value)
    assert "evaluation: a file of rewards has no such key" in str(refused.value)


# Totals


def test_the_total_is_the_weighted_sum_of_the_sources_that_apply():
    nan = math.nan
    scores = {"a": torch.tensor([1.0, nan, 2.0, nan]), "b": torch.tensor([10.0, 20.0, nan, nan])}
    sums, applies = total(scores, {"a": 2.0, "b": -0.5}, 4)
    assert sums.tolist() == [-3.0, -10.0, 4.0, 0.0]
    assert applies.tolist() == [True, True, True, False]


ABSTAINING = """
def some(completions):
    return [[1.0, None, 3.0, 8.0][i % 4] for i in range(len(completions))]
def none_at_all(completions):
    return [None] * len(completions)
"""


def advantages_of(made: Any) -> list[list[float]]:
    """The advantage of each row that is trained on, by group, sorted."""
    buffer = made.collector.collect(0)
    rows = buffer.rows["advantages"].sum(1) / buffer.rows["mask"].sum(1)
    groups = itertools.groupby(zip(buffer.group_ids.tolist(), rows.tolist(), strict=True), key=lambda pair: pair[0])
    return [[x for _, x in members] for _, members in groups]


def test_a_row_without_any_reward_is_in_no_baseline(tmp_path):
    (tmp_path / "source.py").write_text(ABSTAINING)
    some = {"use": "function", "function": f"{tmp_path}/source.py:some", "weight": 2.0}
    none = {"use": "function", "function": f"{tmp_path}/source.py:none_at_all"}
    for rewards in ([some], [some, none]):
        made = runs.trainer(tmp_path, rewards=rewards, advantages="group_mean")
        groups = advantages_of(made)
        assert len(groups) == 4
        for group in groups:  # 2 x (1, 3, 8), whose mean is 8
            assert sorted(group) == pytest.approx([-6.0, -2.0, 8.0])


def test_with_a_second_source_the_row_stays_with_what_applies_to_it(tmp_path):
    (tmp_path / "source.py").write_text(ABSTAINING + "\ndef ones(completions):\n    return [1.0] * len(completions)\n")
    rewards = [
        {"use": "function", "function": f"{tmp_path}/source.py:some", "weight": 2.0},
        {"use": "function", "function": f"{tmp_path}/source.py:ones", "weight": 4.0},
    ]
    made = runs.trainer(tmp_path, rewards=rewards, advantages="group_mean")
    for group in advantages_of(made):  # 6, 4, 10, 20, whose mean is 10
        assert sorted(group) == pytest.approx([-6.0, -4.0, 0.0, 10.0])
    logged = made.meters.read(made.accelerator)
    assert logged["health/reward_missing"] == 4
    assert logged["reward/some/mean"] == pytest.approx(4.0)
    assert logged["reward/total/mean"] == pytest.approx(10.0)


# Rewards by step and by token


def placed(answer: Any, completion: str = "ab cd\n\nef", mask: list[int] | None = None) -> list[float]:
    """Where the rewards of one row of `completion`, a token per character and the end of sequence, stand."""
    from hf_rlhf.scoring.completion_text import CompletionText
    from hf_rlhf.scoring.scorer import Scorer, place

    given = rollouts([completion])
    if mask is not None:
        given.masks = [mask]
    text = CompletionText(tiny_policy()[1])
    answers = Scorer([("mine", Answers(what=[answer]))]).ask(given)["mine"].answers
    return place(answers, given, text, len(given.completion_ids[0])).squeeze(0).tolist()


def at(width: int, **values: float) -> list[float]:
    return [values.get(f"t{i}", 0.0) for i in range(width)]


def test_a_number_stands_at_the_last_sampled_token():
    assert placed(2.0) == at(10, t9=2.0)
    assert placed(2.0, mask=[1] * 8 + [0, 0]) == at(10, t7=2.0)


def test_a_step_stands_at_the_token_with_its_last_character():
    assert placed(Spans([(2, 0.5), (9, -1.0)])) == at(10, t1=0.5, t8=-1.0)
    assert placed(Spans([(2, 0.5), (2, 0.25)])) == at(10, t1=0.75)


def test_a_step_that_ends_in_tool_output_stands_at_the_sampled_token_before_it():
    assert placed(Spans([(4, 1.0)]), mask=[1, 1, 0, 0, 0, 1, 1, 1, 1, 1]) == at(10, t1=1.0)
    assert placed(Spans([(1, 1.0)]), mask=[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]) == at(10, t2=1.0)


def test_token_scores_stand_where_they_are_and_those_of_tool_tokens_are_not_used():
    scores = [float(i) for i in range(10)]
    assert placed(TokenScores(scores)) == scores
    assert placed(TokenScores(scores), mask=[1, 0] * 5) == [x if i % 2 == 0 else 0.0 for i, x in enumerate(scores)]


def test_tokens_of_several_characters_and_characters_of_several_tokens_are_found():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_rlhf.scoring.completion_text import CompletionText
    from hf_rlhf.scoring.scorer import place

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c")]
    vocabulary = {token: i for i, token in enumerate([*letters, "ab", "abc"])}
    tokens = Tokenizer(models.BPE(vocabulary, merges))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    text = "abcé abx"  # abc | two bytes | space | ab | x
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 6
    given = rollouts(["x"])
    given.completions, given.completion_ids, given.masks = [text], [ids], [[1] * len(ids)]
    for end, token in {1: 0, 3: 0, 4: 2, 5: 3, 6: 4, 7: 4, 8: 5}.items():
        found = place([Spans([(end, 1.0)])], given, CompletionText(tokenizer), len(ids)).squeeze(0)
        assert found.tolist() == [float(i == token) for i in range(6)], end


def test_the_score_of_a_row_is_the_sum_over_its_steps_or_sampled_tokens():
    given = rollouts(["ab", "cd"])
    given.masks[1] = [1, 0, 1]
    answer = [Spans([(1, 0.5), (2, 0.25)]), TokenScores([1.0, 10.0, 100.0])]
    assert score([("mine", Answers(what=answer))], given)["mine"].tolist() == [0.75, 101.0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Spans([(99, 1.0)]), "the completion's 1 characters, got 99"),
        (Spans([(-1, 1.0)]), "characters, got -1"),
        (Spans([(1, math.nan)]), "Return None for the whole row"),
        (
            TokenScores([1.0]),
            "one value per completion token (2, including tool tokens and the end-of-sequence token), got 1",
        ),
        (TokenScores([1.0, math.inf]), "must be finite numbers"),
    ],
)
def test_a_wrong_answer_by_step_or_token_is_refused_with_its_row(answer, words):
    assert words in refusal([answer, 0, 0, 0])


def test_rewards_by_token_reach_the_estimator_at_their_tokens(tmp_path):
    """The last sampled token scored by number, by step and by token is one and the same reward."""

    def by_token(given: Rollouts) -> list[Any]:
        return [TokenScores([0.0] * (len(ids) - 1) + [1.0 * (len(ids) % 3)]) for ids in given.completion_ids]

    def by_number(given: Rollouts) -> list[Any]:
        return [float(len(ids) % 3) for ids in given.completion_ids]

    def early(given: Rollouts) -> list[Any]:
        return [TokenScores([1.0 * (len(ids) % 3)] + [0.0] * (len(ids) - 1)) for ids in given.completion_ids]

    def rows(what: Any) -> torch.Tensor:
        made = runs.trainer(tmp_path, rewards=[Answers(what=what)], advantages="reward_to_go")
        return made.collector.collect(0).rows["advantages"]

    assert torch.equal(rows(by_token), rows(by_number))
    assert not torch.equal(rows(early), rows(by_number))
    assert torch.equal(rows(early)[:, 0], rows(by_number)[:, 0])


def test_what_a_source_logs_beside_its_scores_stands_in_the_table_of_completions(tmp_path):
    @dataclass(kw_only=True)
    class Logs(Answers):
        def take_logs(self) -> Any:
            return {"words": [f"w{i}" for i in range(self.rows)]}, {"seen": [3.0]}

        def __call__(self, rollouts: Rollouts) -> Any:
            self.rows = len(rollouts)
            return [float(i) for i in range(len(rollouts))]

    made = runs.trained(tmp_path, rewards=[Logs(label="mine")])
    rows = pq.read_table(next((tmp_path / "completions").glob("*.parquet"))).to_pylist()
    assert [row["mine/words"] for row in rows] == [f"w{i}" for i in range(len(rows))]
    assert runs.entries(made)[0]["reward/mine/seen"] == 3.0
