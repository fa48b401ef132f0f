"""The built-in reward sources on real parts."""

from __future__ import annotations

import pytest

from hf_rlhf.batch import Rollouts
from hf_rlhf.scoring.scorer import Scorer
from hf_rlhf_plugins.rewards.exact_match import ExactMatch
from hf_rlhf_plugins.rewards.format import Format
from hf_rlhf_plugins.rewards.function import Function
from hf_rlhf_plugins.rewards.length import Length


def rows(completions, *, prompts=None, masks=None, **columns):
    count = len(completions)
    return Rollouts(
        prompts=prompts or ["p"] * count,
        completions=completions,
        prompt_ids=[[1]] * count,
        completion_ids=[[2]] * count,
        masks=masks or [[1]] * count,
        finish_reasons=["stop"] * count,
        columns=columns,
        group_ids=list(range(count)),
    )


# exact_match, format, length


@pytest.mark.proves("rewards.exact_match", how="closed form", tolerance="exact")
def test_exact_match_is_one_on_equal_text_and_has_no_score_without_a_reference():
    scores = ExactMatch()(rows(["95", " 95\n", "9 5", "95", "96"], answer=["95", 95, "95", None, "95"]))
    assert scores == [1.0, 1.0, 0.0, None, 0.0]


def test_exact_match_settings_change_what_is_equal():
    batch = rows(["Yes", " yes"], truth=["yes", "yes"])
    assert ExactMatch(column="truth")(batch) == [0.0, 1.0]
    assert ExactMatch(column="truth", ignore_case=True)(batch) == [1.0, 1.0]
    assert ExactMatch(column="truth", strip=False)(batch) == [0.0, 0.0]


def test_exact_match_votes_with_the_text_it_compares():
    assert ExactMatch(ignore_case=True).answer(" Yes ") == "yes"
    assert ExactMatch().answer("  ") is None


def test_rewards_say_which_columns_they_read():
    assert ExactMatch(column="truth").columns() == {"truth"}


@pytest.mark.proves("rewards.format", how="closed form", tolerance="exact")
def test_format_matches_the_whole_completion_over_line_breaks():
    whole = "<think>a\nb</think>\n<answer>c</answer>"
    assert Format()(rows([whole, whole + "!", "x" + whole, ""])) == [1.0, 0.0, 0.0, 0.0]
    assert Format(pattern=r"\d+")(rows(["12", "12a"])) == [1.0, 0.0]


def test_format_refuses_what_is_no_regular_expression():
    with pytest.raises(ValueError, match="must be a regular expression"):
        Format(pattern="(")


@pytest.mark.proves("rewards.length", how="closed form", tolerance="exact")
def test_length_falls_in_a_line_from_target_to_maximum():
    scores = Length(unit="characters", target=2, maximum=6)(rows(["", "ab", "abc", "abcd", "abcdef", "abcdefgh"]))
    assert scores == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_length_counts_words_or_sampled_tokens():
    batch = rows(["one two  three"], masks=[[1, 0, 0, 1]])
    assert Length(unit="words", target=1, maximum=5)(batch) == [-0.5]
    assert Length(unit="tokens", target=1, maximum=5)(batch) == [-0.25]


def test_length_needs_a_maximum_above_its_target():
    with pytest.raises(ValueError, match=r"maximum must be above target=5, got 5"):
        Length(target=5, maximum=5)


# function

SOURCE = """
def shout(completions, **kwargs):
    return [float(text.isupper()) for text in completions]

async def later(completions, answer, log_metric, trainer_state, bonus=2.0):
    log_metric("seen", len(completions))
    return [bonus * (text == a) + trainer_state.global_step for text, a in zip(completions, answer)]

def rolled(rollouts, scale=1.0):
    return [scale * len(text) for text in rollouts.completions]

def broken(completions, **kwargs):
    return [1 / 0 for _ in completions]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.proves("rewards.function", how="closed form", tolerance="exact")
def test_functions_are_found_in_files_and_modules_and_given_directly(file):
    import sys

    before = list(sys.path)
    batch = rows(["AB", "ab"])
    assert Function(function=f"{file}:shout")(batch) == [1.0, 0.0]
    assert Function(function="json.encoder:py_encode_basestring").columns() == {"s"}
    assert Function(function=lambda completions: [len(text) for text in completions])(batch) == [2, 2]
    assert sys.path == before


def test_a_function_of_rollouts_gets_rollouts(file):
    assert Function(function=f"{file}:rolled")(rows(["ab", ""])) == [2.0, 0.0]
    assert Function(function=f"{file}:rolled").columns() == set()


def asked(reward, batch):
    return Scorer([("later", reward)]).ask(batch)["later"]


def test_async_functions_are_awaited_also_inside_a_running_loop(file):
    import asyncio

    reward = Function(function=f"{file}:later")
    batch = rows(["a", "b"], answer=["a", "a"])
    assert reward.columns() == {"answer"}
    found = asked(reward, batch)
    assert found.answers == [2.0, 0.0]
    assert found.metrics == {"seen": [2.0]}

    async def inside():
        return asked(reward, batch)

    reward.observe({})
    found = asyncio.run(inside())
    assert found.answers == [3.0, 1.0]
    assert found.metrics == {"seen": [2.0]}


def test_the_count_of_rollouts_is_saved(file):
    reward = Function(function=f"{file}:later")
    reward.observe({})
    resumed = Function(function=f"{file}:later")
    resumed.load_state_dict(reward.state_dict())
    assert asked(resumed, rows(["b"], answer=["a"])).answers == [1.0]


def test_errors_of_functions_name_them(file):
    with pytest.raises(RuntimeError, match=r"my_rewards\.py:broken: ZeroDivisionError"):
        Function(function=f"{file}:broken")(rows(["a"]))
    with pytest.raises(ValueError, match=r"no function 'shot'; it has: shout, later, rolled, broken"):
        Function(function=f"{file}:shot").columns()
    with pytest.raises(ValueError, match=r"must be file\.py:name or package\.module:name"):
        Function(function="shout").columns()
    with pytest.raises(ValueError, match="FileNotFoundError"):
        Function(function="/nowhere/x.py:f").columns()
    with pytest.raises(ValueError, match="ModuleNotFoundError"):
        Function(function="no_such_package.x:f").columns()


def test_functions_are_labelled_by_their_name(file):
    assert Function(function=f"{file}:shout").label == "shout"
    assert Function(function=len).label == "len"
    assert Function(function=f"{file}:shout", label="loud").label == "loud"


def test_odd_logging_is_dropped_with_a_warning(caplog):
    def logs(completions, log_extra, log_metric):
        log_extra("short", [1])
        log_extra("right", [1, 2])
        log_extra("none", None)
        log_metric("odd", "x")
        log_metric("good", 1)
        return [0.0] * len(completions)

    reward = Function(function=logs)
    assert reward(rows(["a", "b"])) == [0.0, 0.0]
    assert reward.take_logs() == ({"right": [1, 2]}, {"good": [1.0]})
    assert caplog.text.count("dropped") == 3


def test_a_function_cannot_change_what_others_see():
    def hostile(prompts, completions, completion_ids, answer):
        for values in (prompts, completions, completion_ids, answer):
            values.clear()
        return [0.0, 0.0]

    batch = rows(["a", "b"], answer=["c", "d"])
    Function(function=hostile)(batch)
    assert batch.completions == ["a", "b"]
    assert batch.columns == {"answer": ["c", "d"]}


CHAT = [[{"role": "user", "content": "?"}]] * 2


@pytest.mark.proves("rewards.function", how="parity", tolerance="exact")
def test_rewards_of_trl_run_unchanged():
    formats = rows(["<think>a</think>b", "b"], prompts=CHAT)
    assert Function(function="trl.rewards:think_format_reward")(formats) == [1.0, 0.0]
    accuracy = Function(function="trl.rewards:accuracy_reward")
    assert accuracy.columns() == {"solution"}
    boxed = rows([r"\boxed{\frac{1}{3}}", r"\boxed{2}"], prompts=CHAT, solution=[r"\frac{1}{3}"] * 2)
    assert accuracy(boxed) == [1.0, 0.0]
    assert set(accuracy.take_logs()[0]) == {"solution", "gold_parsed", "answer_parsed"}


@pytest.mark.parametrize(
    "name",
    [
        "accuracy_reward",
        "reasoning_accuracy_reward",
        "think_format_reward",
        "get_cosine_scaled_reward(10)",
        "get_repetition_penalty_reward()",
        "get_soft_overlong_punishment(10, 5)",
    ],
)
def test_every_reward_of_trl_runs(name):
    from trl import rewards

    name, _, arguments = name.partition("(")
    function = getattr(rewards, name)
    if arguments:
        function = function(*(int(number) for number in arguments.strip(")").split(",") if number))
    reward = Function(function=function)
    assert reward.columns() <= {"solution"}
    assert len(reward(rows(["<think>a</think>1", "2"], prompts=CHAT, solution=["1", "1"]))) == 2


@pytest.mark.proves("rewards.length", how="parity", tolerance="1e-6")
def test_length_is_the_soft_overlong_punishment_of_trl():
    from trl.rewards import get_soft_overlong_punishment

    batch = rows(["x"] * 14, masks=[[1] * count for count in range(14)], prompts=["p"] * 14)
    batch.completion_ids = [[0] * count for count in range(14)]
    expected = Function(function=get_soft_overlong_punishment(10, 4))(batch)
    assert Length(target=6, maximum=10)(batch) == pytest.approx(expected)
