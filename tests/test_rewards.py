"""The built-in reward sources on real parts."""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import contextmanager

import pytest

from hf_rlhf.batch import Rollouts
from hf_rlhf_plugins.rewards._math_worker import Worker
from hf_rlhf_plugins.rewards.exact_match import ExactMatch
from hf_rlhf_plugins.rewards.format import Format
from hf_rlhf_plugins.rewards.function import Function
from hf_rlhf_plugins.rewards.length import Length
from hf_rlhf_plugins.rewards.math_answer import MathAnswer
from hf_rlhf_plugins.rewards.reward_model import RewardModel


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


@contextmanager
def open_reward(reward):
    try:
        yield reward
    finally:
        reward.close()


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
    assert MathAnswer(column="truth").columns() == {"truth"}


@pytest.mark.proves("rewards.format", how="closed form", tolerance="exact")
def test_format_matches_the_whole_completion_over_line_breaks():
    whole = "<think>a\nb</think>\n<answer>c</answer>"
    assert Format()(rows([whole, whole + "!", "x" + whole, ""])) == [1.0, 0.0, 0.0, 0.0]
    assert Format(pattern=r"\d+")(rows(["12", "12a"])) == [1.0, 0.0]


def test_format_refuses_what_is_no_regular_expression():
    with pytest.raises(ValueError, match="not a regular expression"):
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
    with pytest.raises(ValueError, match=r"maximum \(5\) must be above target \(5\)"):
        Length(target=5, maximum=5)


# math_answer


@pytest.mark.proves("rewards.math_answer", how="closed form", tolerance="exact")
def test_math_answer_compares_values_and_not_spellings():
    completions = [r"so \boxed{\frac{1}{2}}", "The answer is 0.5", "I say 1/2.", r"\boxed{2}", "no idea"]
    with open_reward(MathAnswer(workers=1)) as reward:
        assert reward(rows(completions, answer=["0.5"] * 5)) == [1.0, 1.0, 1.0, 0.0, 0.0]
        assert reward(rows(["18", "18", "18"], answer=[None, 18, "what?"])) == [None, 1.0, None]


def test_math_answer_reads_reference_and_completion_after_the_marker(caplog):
    with open_reward(MathAnswer(workers=1, answer_after="####")) as reward:
        batch = rows(
            ["#### 17 no, #### 18", "18", "#### 18\n"], answer=["9*2=<<9*2=18>>18\n#### 18", "#### 1,018", "18"]
        )
        assert reward(batch) == [1.0, 0.0, None]
    assert "row 2: no '####' in column answer" in caplog.text


def test_math_answer_votes_alike_for_equal_answers():
    with open_reward(MathAnswer(workers=1)) as reward:
        assert reward.answer(r"thus \boxed{18}") == reward.answer("it is 18") == "18"
        assert reward.answer("no idea") is None


def test_hostile_completions_come_back_in_time_off_the_main_thread_too(caplog):
    caplog.set_level(logging.WARNING)
    hostile = [
        r"\boxed{9^{9^{9^9}}}",
        r"\boxed{(10^9)!}",
        "(" * 100_000,
        r"\boxed{" * 20_000,
        "[" * 50_000 + "]" * 50_000,
    ]
    with open_reward(MathAnswer(workers=1, timeout=1.0)) as reward:
        assert reward(rows(["1"], answer=["1"])) == [1.0]
        for completion in hostile:
            results = []

            def judge(text=completion, results=results):
                started = time.monotonic()
                results.append(reward._score(7, text, "1"))
                results.append(time.monotonic() - started)

            reward(rows(["1"], answer=["1"]))
            thread = threading.Thread(target=judge)
            thread.start()
            thread.join()
            assert results[0] in (None, 0.0)
            assert results[1] < reward.timeout + 1
        assert reward(rows(["1", "2"], answer=["1", "1"])) == [1.0, 0.0]
    assert "row 7 has no score" in caplog.text
    assert "took over 1 s" in caplog.text


def test_a_worker_that_dies_is_replaced_and_its_row_has_no_score(caplog):
    with open_reward(MathAnswer(workers=1)) as reward:
        reward(rows(["1"], answer=["1"]))
        (worker,) = reward._pool.idle.queue
        worker._process.kill()
        worker._process.wait()
        assert reward(rows(["1", "1"], answer=["1", "1"])) == [None, 1.0]
    assert "crashed its process" in caplog.text


def test_closing_ends_the_workers_and_a_later_call_starts_new_ones():
    reward = MathAnswer(workers=2)
    reward(rows(["1"], answer=["1"]))
    processes = [worker._process for worker in reward._pool.idle.queue]
    reward.close()
    assert all(process.poll() is not None for process in processes)
    with open_reward(reward):
        assert reward(rows(["1"], answer=["1"])) == [1.0]


def test_a_worker_ends_when_its_parent_closes_the_pipe():
    worker = Worker(5.0)
    assert worker.ask("1", "1", None) == {"score": 1.0, "answer": "1"}
    worker._process.stdin.close()
    assert worker._process.wait(20) == 0
    worker._process.stdout.close()


def test_odd_text_reaches_the_worker_whole():
    with open_reward(MathAnswer(workers=1)) as reward:
        assert reward(rows(["\ud800 é\n\r\u2028 1", "", "\0"], answer=["1", "1", "1"])) == [1.0, 0.0, 0.0]


def test_math_answer_agrees_with_the_graded_solutions_of_gsm8k(gsm8k):
    with open(gsm8k / "example_model_solutions.jsonl", encoding="utf-8") as file:
        graded = [json.loads(line) for line in file][::6]
    solutions = [row["6b_finetuning"] for row in graded]
    batch = rows([solution["solution"] for solution in solutions], answer=[row["ground_truth"] for row in graded])
    with open_reward(MathAnswer(answer_after="A:", workers=2)) as reward:
        scores = reward(batch)
    agree = sum(score == float(solution["is_correct"]) for score, solution in zip(scores, solutions, strict=True))
    assert len(scores) > 200
    assert agree >= 0.99 * len(scores)


# reward_model


def save_classifier(folder, tokenizer, *, num_labels=1, cls="LlamaForSequenceClassification", pad=None, **options):
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=pad,
        num_labels=num_labels,
        **options,
    )
    getattr(transformers, cls)(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def one_by_one(folder, token_rows):
    """Each row alone through the model as plain transformers loads it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in token_rows]


def loaded(folder, **settings):
    import torch

    reward = RewardModel(model=str(folder), **settings)
    reward.load_model(torch.device("cpu"))
    return reward


TEXTS = ["a", "longer text", "", "the longest text of all<eos>", "zz"]


@pytest.mark.proves("rewards.reward_model", how="invariance", tolerance="1e-6")
@pytest.mark.parametrize("pad", [None, 256, 257], ids=["no pad token", "a pad token", "padding is end of sequence"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_reward_model_batches_score_as_single_rows_do(tmp_path, tokenizer, pad, batch_size):
    folder = save_classifier(tmp_path, tokenizer, pad=pad)
    scores = loaded(folder, batch_size=batch_size)(rows(TEXTS, prompts=["say: "] * 5))
    expected = one_by_one(folder, [tokenizer("say: " + text)["input_ids"] for text in TEXTS])
    assert scores == pytest.approx(expected, abs=1e-6)
    assert len(set(scores)) == 5


@pytest.mark.proves("rewards.reward_model", how="closed form", tolerance="1e-6")
def test_reward_model_speaks_its_own_chat_template(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
    folder = save_classifier(tmp_path, chat_tokenizer)
    scores = loaded(folder)(rows(["yes", "no"], prompts=[[{"role": "user", "content": "well?"}]] * 2))
    expected = one_by_one(folder, [chat_tokenizer(f"[u]well?[a]{text}")["input_ids"] for text in ("yes", "no")])
    assert scores == pytest.approx(expected, abs=1e-6)


def test_reward_model_keeps_the_end_of_long_texts(tmp_path, tokenizer):
    folder = save_classifier(tmp_path, tokenizer)
    scores = loaded(folder, max_length=4)(rows(["cdef"], prompts=["ab"]))
    assert scores == pytest.approx(one_by_one(folder, [tokenizer("cdef")["input_ids"]]), abs=1e-6)


def test_reward_model_is_frozen_in_eval_mode_and_in_its_dtype(tmp_path, tokenizer):
    import torch

    folder = save_classifier(tmp_path, tokenizer, attention_dropout=0.5)
    reward = loaded(folder, dtype="float64")
    model, _ = reward._loaded
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float64
    batch = rows(TEXTS)
    assert reward(batch) == reward(batch)
    reward.close()
    with pytest.raises(RuntimeError, match="not loaded"):
        reward(batch)


def test_what_is_no_reward_model_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="has 2 labels"):
        loaded(save_classifier(tmp_path / "two", tokenizer, num_labels=2))
    with pytest.raises(ValueError, match=r"no trained weights for score\.weight"):
        loaded(save_classifier(tmp_path / "language", tokenizer, cls="LlamaForCausalLM"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        loaded(save_classifier(tmp_path / "bare", None))
    reward = loaded(save_classifier(tmp_path / "plain", tokenizer))
    with pytest.raises(ValueError, match="no chat template"):
        reward(rows(["a"], prompts=[[{"role": "user", "content": "b"}]]))


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


def test_async_functions_are_awaited_also_inside_a_running_loop(file):
    import asyncio

    reward = Function(function=f"{file}:later")
    batch = rows(["a", "b"], answer=["a", "a"])
    assert reward.columns() == {"answer"}
    assert reward(batch) == [2.0, 0.0]

    async def inside():
        return reward(batch)

    reward.observe({})
    assert asyncio.run(inside()) == [3.0, 1.0]
    assert reward.take_logs() == ({}, {"seen": [2.0, 2.0]})
    assert reward.take_logs() == ({}, {})


def test_the_count_of_rollouts_is_saved(file):
    reward = Function(function=f"{file}:later")
    reward.observe({})
    resumed = Function(function=f"{file}:later")
    resumed.load_state_dict(reward.state_dict())
    assert resumed(rows(["b"], answer=["a"])) == [1.0]


def test_errors_of_functions_name_them(file):
    with pytest.raises(RuntimeError, match=r"my_rewards\.py:broken: ZeroDivisionError"):
        Function(function=f"{file}:broken")(rows(["a"]))
    with pytest.raises(ValueError, match=r"no function 'shot'; it has: shout, later, rolled, broken"):
        Function(function=f"{file}:shot").columns()
    with pytest.raises(ValueError, match=r"write file\.py:name or package\.module:name"):
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
